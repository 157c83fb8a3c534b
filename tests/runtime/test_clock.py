"""Seconds by phase, from clocks that nobody can set back."""

import subprocess
import sys
import time

import pytest

from launcher.runtime import clock
from launcher.runtime.clock import Clock, process_age_s

AGE = "import time; time.sleep(0.3); from launcher.runtime.clock import process_age_s; print(process_age_s())"


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


def test_the_age_of_a_process_begins_with_it_and_ignores_the_time_of_day(monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", AGE], capture_output=True, text=True, check=True)
    lived_s = time.monotonic() - start
    assert 0.3 < float(done.stdout) <= lived_s + 0.02  # it is counted in ticks of 10 ms
    before = process_age_s()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert before <= Clock().elapsed_s["imports"] < before + 60
