"""Signals and dead launchers before a run has anything to save: while Python, torch and transformers are imported."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.support.launches import (
    ALONE,
    LAUNCH,
    LAUNCH_ONE,
    MAIN,
    family_of_process,
    finished,
    seconds_until_gone,
    started,
    wait_until,
)

GONE_S = 5.0
TINY = ["recipe=tiny", "compile.mode=off", "train.steps=1000", "run.output_dir=run"]

# As torch's launcher starts its workers: in sessions of their own, with its variables.
LAUNCHER = """
import os, subprocess, sys
os.environ["TORCHELASTIC_RUN_ID"] = "x"
subprocess.run([sys.executable, "-c", sys.argv[1]], start_new_session=True)
"""
IMPORTS_THAT_HOLD_THE_GIL = """
import ctypes, os, signal
from launcher.runtime.parent import end_with_parent
end_with_parent(signal.SIGKILL)
print(os.getpid(), flush=True)
ctypes.PyDLL(None).sleep(600)
"""
SLOW_START = """
import os, signal, time
from launcher.runtime.parent import end_with_parent
launcher = os.getppid()
print(os.getpid(), flush=True)
while os.getppid() == launcher:
    time.sleep(0.01)
end_with_parent(signal.SIGKILL)
time.sleep(600)
"""
JOB_OF_A_SHELL = """
import os, signal, time
from launcher.runtime.parent import end_with_parent
end_with_parent(signal.SIGKILL)
print("alive")
"""


def loaded(process: subprocess.Popen[str], library: str) -> bool:
    return library in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.parametrize("worker", [IMPORTS_THAT_HOLD_THE_GIL, SLOW_START], ids=["holds the GIL", "starts slowly"])
def test_fault_45_a_worker_ends_with_its_launcher_whatever_it_is_doing_and_also_if_it_comes_late(worker: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, worker], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout
        orphan = psutil.Process(int(launcher.stdout.readline()))
        launcher.kill()
        seconds_until_gone([orphan], timeout_s=GONE_S)


def test_a_job_of_a_shell_that_has_a_launchers_variables_lives() -> None:
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no"}
    command = ["bash", "-c", '"$0" -c "$1"; true', sys.executable, JOB_OF_A_SHELL]
    assert subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True).stdout == "alive\n"


@pytest.mark.faults
@pytest.mark.parametrize("launch", [LAUNCH_ONE, LAUNCH], ids=["one process", "two processes"])
def test_fault_45_workers_are_gone_soon_after_their_launcher_is_killed(tmp_path: Path, launch: list[str]) -> None:
    process = started(*launch, MAIN, *TINY, cwd=tmp_path)
    wait_until(lambda: len(family_of_process(process)) > (2 if launch is LAUNCH else 1), process=process)
    everyone = family_of_process(process)
    process.kill()
    seconds_until_gone(everyone, timeout_s=GONE_S)
    process.communicate()
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("signum", "code", "library", "mode"),
    [
        (signal.SIGTERM, 143, "libtorch_cpu", "train"),
        (signal.SIGTERM, 143, "tokenizers", "train"),  # transformers begins: its imports swallow exceptions
        (signal.SIGINT, 130, "tokenizers", "preview"),
        (signal.SIGHUP, 129, "tokenizers", "parity"),
    ],
)
def test_fault_44_a_signal_during_imports_ends_the_process_with_its_code_and_one_line(
    tmp_path: Path, signum: signal.Signals, code: int, library: str, mode: str
) -> None:
    process = started(*ALONE, MAIN, *TINY, f"mode={mode}", cwd=tmp_path)
    wait_until(lambda: loaded(process, library), process=process)
    time.sleep(0.5)
    process.send_signal(signum)
    _, err = process.communicate(timeout=GONE_S)
    assert process.returncode == code
    assert len(err.splitlines()) == 1 and err.endswith(f"(exit code {code})\n"), err
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_a_rank_whose_peer_never_comes_says_so_and_ends_with_code_8(tmp_path: Path) -> None:
    """As with the variables of an earlier shell."""
    stale = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    stale |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "ACCELERATE_USE_CPU": "true"}
    done = finished(*ALONE, MAIN, *TINY, "data.wait_s=1", cwd=tmp_path, **stale)
    assert done.returncode == 8
    assert "rank 0 of 2 has not come to 127.0.0.1:9." in done.stderr and "Traceback" not in done.stderr


@pytest.mark.faults
def test_a_rank_whose_machine_lacks_the_data_ends_the_one_that_waits_on_another_machine(tmp_path: Path) -> None:
    ranks = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "ACCELERATE_USE_CPU": "true"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    (tmp_path / "here").mkdir()
    with open(ROOT / "recipes" / "tiny" / "train.jsonl", encoding="utf-8") as shipped:
        (tmp_path / "here" / "rows.jsonl").write_text("".join(next(shipped) for _ in range(20)), encoding="utf-8")
    command = [*ALONE, MAIN, *TINY, "data.sources=[{path: ./rows.jsonl}]", "data.validation=0"]
    waits = started(*command, cwd=tmp_path / "here", RANK="0", **ranks)
    fails = started(*command, cwd=tmp_path, RANK="1", **ranks)
    (_, told), (_, own) = (process.communicate(timeout=60) for process in (waits, fails))
    assert (waits.returncode, fails.returncode) == (3, 3), told + own
    assert f"rank 1 on {socket.gethostname()} failed before the run began: " in told and "before the run" not in own
    assert str(tmp_path / "rows.jsonl") in told and str(tmp_path / "rows.jsonl") in own
