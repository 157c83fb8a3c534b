"""Ends the process where its main thread does not react to a signal.

Python runs a signal's handler in the main thread, once that returns from C: a rank that waits there for others is deaf.
But the number of the signal is written to a pipe at once (signal.set_wakeup_fd). A thread reads it, gives the main
thread time to end by itself, and then ends the process. Works wherever the GIL is released.
"""

import math
import os
import select
import signal
import threading
import time

from launcher.runtime.ending import end_process
from launcher.runtime.ranks import rank_info
from launcher.runtime.signals import STOPS, is_deferring, stop_code_and_reason

GRACE_S = 3.0  # where nothing can be saved
LOOP_GRACE_S = 24.0  # in the training loop: a step and its checkpoint; the launcher kills its workers after 30 s


def watch_signals() -> None:
    """From now on, until the process ends. Call this in the main thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def _watch(reader: int) -> None:
    numbers: list[int] = []
    deadline = math.inf
    while (left_s := deadline - time.monotonic()) > 0:
        if select.select([reader], [], [], None if left_s == math.inf else left_s)[0]:
            number = os.read(reader, 1)[0]
            if number in STOPS:
                deadline = min(deadline, time.monotonic() + _grace_s(number, again=bool(numbers)))
                numbers.append(number)
    end_process(*stop_code_and_reason(STOPS[numbers[0]][0]))


def _grace_s(number: int, *, again: bool) -> float:
    if not is_deferring() or (again and number == signal.SIGINT):
        return GRACE_S
    # Alone, a slow step comes to its end: nobody kills the process meanwhile. SLURM leaves minutes after SIGUSR1.
    return math.inf if number == signal.SIGUSR1 or rank_info().world_size == 1 else LOOP_GRACE_S
