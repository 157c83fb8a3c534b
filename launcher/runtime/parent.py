"""Ends this process with the process launcher that started it. Stdlib only: it comes before all other imports."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # torchrun's; accelerate's for one process


def under_launcher() -> bool:
    """Whether torchrun or `accelerate launch` has started this process."""
    return any(name in os.environ for name in LAUNCHER_VARIABLES)


def end_with_parent(how: signal.Signals) -> None:
    """Under a launcher, ask the kernel to send `how` to this process when the launcher dies (Linux); if it is dead
    already, send it now. A launcher that is killed would otherwise leave its trainers running.

    Without a launcher the parent is a shell, which may end before its job.
    """
    if not under_launcher():
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, how)
    if os.getppid() != parent or _has_adopted_us(parent):
        os.kill(os.getpid(), how)


def _has_adopted_us(parent: int) -> bool:
    """Whether the launcher died before this process could ask who it is: the orphan's parent is then an init process.

    That is no Python program, and has another session. So has a launcher, but that is a Python program; a shell from
    which the variables of a launcher were inherited is none, but has our session.
    """
    try:
        program = os.readlink(f"/proc/{parent}/exe")
    except PermissionError:  # another user's
        program = ""
    except OSError:  # gone, or hidden: nothing can be told
        return False
    return "python" not in os.path.basename(program) and os.getsid(parent) != os.getsid(0)
