"""Seconds by phase of a run. Monotonic clocks only: the time of day may be set back while a run goes on."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def process_age_s() -> float:
    """Seconds since this process was started, from the kernel's clock since boot (Linux)."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_ticks = int(after_name[19])  # field 22 of the file, man 5 proc
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


class Clock:
    """Seconds by phase, in order; phases of one name add up. A phase inside another is not counted in the outer one.

    The first phase is "imports": from the start of the process until the clock is made.
    """

    def __init__(self) -> None:
        self.elapsed_s: dict[str, float] = {"imports": process_age_s()}
        self._inner_s = 0.0  # of phases that have ended inside the present one

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer_inner_s, self._inner_s = self._inner_s, 0.0
        self.elapsed_s.setdefault(name, 0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            taken_s = time.perf_counter() - start
            self.elapsed_s[name] += taken_s - self._inner_s
            self._inner_s = outer_inner_s + taken_s
