"""Whole processes of the launcher: alone, or two ranks under `accelerate launch` that speak through gloo."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import ROOT

MAIN = ROOT / "launcher" / "main.py"
ALONE = [sys.executable]
# --main_process_port 0 takes a free port, so that two suites on one machine do not meet.
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu2.yaml"),
    "--main_process_port", "0",
]  # fmt: skip
LAUNCH_ONE = [*LAUNCH[:3], "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no"]  # fmt: skip
HANG_S = 600  # no measure of speed: a process that hangs is to fail a test, not to stop the suite


def started(*command: Any, cwd: Path, **variables: str) -> subprocess.Popen[str]:
    """Start a command in a session of its own, with what it prints kept apart from the test's."""
    own = {"ACCELERATE_DISABLE_RICH": "1", "HF_HOME": str(cwd / "hf"), "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
        env={**os.environ, **own, **variables}, start_new_session=True,
    )  # fmt: skip


def family_of_process(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The process and all its descendants; torch's launcher gives each worker a session of its own."""
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def ended(process: subprocess.Popen[str], *command: Any, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
    """Wait for its end. After the timeout all its processes are ended, and the assertion shows where each was."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        for child in reversed(family_of_process(process)):
            child.send_signal(signal.SIGABRT)
        out, err = process.communicate()
        raise AssertionError(f"not done after {timeout_s} s\n{out[-2000:]}{err[-8000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def finished(*command: Any, cwd: Path, timeout_s: float = 900, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run to its end, however that is."""
    return ended(started(*command, cwd=cwd, **variables), *command, timeout_s=timeout_s)


def succeeded(*command: Any, cwd: Path) -> str:
    """Run to its good end; its stdout."""
    done = finished(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def wait_until(condition: Callable[[], Any], *, process: subprocess.Popen[str], timeout_s: float = HANG_S) -> None:
    """Wait for a moment of a run. Fails if the process ends before it, or after the timeout."""
    limit = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "the run ended before that moment"
        assert time.monotonic() < limit, "that moment did not come"
        time.sleep(0.02)


def seconds_until_gone(processes: list[psutil.Process], *, timeout_s: float) -> float:
    """Seconds until none of these processes is there. Kills what is left after the timeout and fails."""
    start = time.monotonic()
    _, left = psutil.wait_procs(processes, timeout=timeout_s)
    for process in left:
        process.kill()
    assert not left, f"{len(left)} processes were still there after {timeout_s:g} s: {left}"
    return time.monotonic() - start
