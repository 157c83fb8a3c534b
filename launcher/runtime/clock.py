"""Seconds by phase of a run. Monotonic clocks only: the time of day may be set back while a run goes on."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.runtime.progress import PROGRESS


def boot_clock_s() -> float:
    """Seconds since the machine was booted (Linux)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def start_ticks(pid: int) -> int:
    """When a process was started, in ticks since boot (Linux). Raises OSError where it is gone, or hidden."""
    # Bytes: the kernel may cut a process's name inside a character.
    after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(after_name[19])  # field 22 of the file, man 5 proc


def process_started_s() -> float:
    """When this process was started, by `boot_clock_s`."""
    return start_ticks(os.getpid()) / os.sysconf("SC_CLK_TCK")


def seconds_since(started_s: float | None = None) -> Callable[[], float]:
    """A clock that counts seconds from `started_s`, by `boot_clock_s`; None: from the start of this process."""
    zero = process_started_s() if started_s is None else started_s
    return lambda: boot_clock_s() - zero


def process_age_s() -> float:
    """Seconds since this process was started."""
    return seconds_since()()


class Clock:
    """Seconds by phase, in order; phases of one name add up. A phase inside another is not counted in the outer.

    The first phase is "imports": from the start of the process until the clock is made. `started_s`, by `boot_clock_s`,
    is another start.
    """

    def __init__(self, started_s: float | None = None) -> None:
        self.elapsed_s: dict[str, float] = {"imports": seconds_since(started_s)()}
        self._inner_s = 0.0  # of phases that have ended inside the present one

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer_inner_s, self._inner_s = self._inner_s, 0.0
        self.elapsed_s.setdefault(name, 0.0)
        start = time.perf_counter()
        try:
            with PROGRESS.phase(name):
                yield
        finally:
            taken_s = time.perf_counter() - start
            self.elapsed_s[name] += taken_s - self._inner_s
            self._inner_s = outer_inner_s + taken_s
