"""Seconds by phase, from clocks that nobody can set back."""

import subprocess
import sys

import pytest

from launcher.runtime import clock
from launcher.runtime.clock import Clock, boot_clock_s

BIRTH = "from launcher.runtime.clock import process_started_s; print(process_started_s())"
TICK_S = 0.01  # in which the start of a process is counted


def test_a_phase_inside_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    phases = Clock()
    with phases.phase("compile"), phases.phase("capture"):
        pass
    with phases.phase("compile"):
        pass
    assert list(phases.elapsed_s) == ["imports", "compile", "capture"]
    assert (phases.elapsed_s["compile"], phases.elapsed_s["capture"]) == (7.0 + 1.0, 3.0)


def test_a_process_began_between_its_start_and_its_answer() -> None:
    before_s = boot_clock_s()
    done = subprocess.run([sys.executable, "-c", BIRTH], capture_output=True, text=True, check=True)
    assert before_s - TICK_S <= float(done.stdout) <= boot_clock_s()
