"""Runs each part of a bench in a process of its own, so that start-up, peaks and caches are not shared.

The child is a fresh interpreter (multiprocessing's spawn) that imports everything itself; this module and the parent
import no torch. The child sends the events of its task, then that it is done or the error. It ends with its parent,
however that ends.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from launcher.credentials import shortened
from launcher.errors import LauncherError
from launcher.runtime.child_processes import exit_with_parent
from launcher.runtime.streams import prepare_standard_streams
from launcher.train.request import Request

Task = Callable[[Request], Iterator[Any]]

EXIT_TIMEOUT_S = 30.0  # for a child to exit after its last message


class ChildFailed(LauncherError):
    """A child ended without a result, and not by an error meant for the user."""


def run_child(task: Task, request: Request) -> Iterator[Any]:
    """Yield what `task(request)` yields in a new process. `task` is a function of a module that imports no torch.

    Raises the LauncherError that the task raises, and ChildFailed for any other end.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task, request, sender))
    process.start()
    sender.close()  # only the child's copy is left, so that its death closes the pipe
    try:
        while (message := receiver.recv())[0] == "event":
            yield message[1]
        if message[0] == "error":
            raise message[1]
        process.join(EXIT_TIMEOUT_S)
    except EOFError:
        process.join(EXIT_TIMEOUT_S)
        raise ChildFailed(_death(process.exitcode)) from None
    finally:
        process.kill()  # it may still run: after an error or an interrupt here
        process.join()
        receiver.close()


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        why = ", as a machine that runs out of memory does" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{why}"
    return f"its process ended without a result, with code {code}"


def _child(task: Task, request: Request, sender: Connection) -> None:
    prepare_standard_streams()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts parent and child: the parent ends both
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    exit_with_parent()
    try:
        for event in task(request):
            sender.send(("event", event))
        sender.send(("done", None))
    except LauncherError as error:
        sender.send(("error", error))
    except Exception as error:
        traceback.print_exc()
        reason = shortened(f"{type(error).__name__}: {error}", 500)
        sender.send(("error", ChildFailed(f"its process failed: {reason}")))
