"""How far the main thread of this process has come. The other ranks are told (heartbeat.py)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

TIMED_PHASES = ("train", "evaluate")  # of Clock: how long a step takes is known; a load, a compile or a save is not


@dataclass
class Progress:
    """`collectives` entered and `micro_batches` begun since the last of them: all ranks go through the same ones in the
    same order, so the rank that has fewer is the one that the others wait for."""

    collectives: int = 0
    micro_batches: int = 0
    timed: bool = False  # whether standing still is a fault: in the training loop, but for its checkpoints

    def enter_collective(self) -> None:
        self.collectives, self.micro_batches = self.collectives + 1, 0

    def begin_micro_batch(self) -> None:
        self.micro_batches += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, `timed` is the phase's. Once the loop has begun, what lies between its phases is timed too."""
        in_loop = self.timed or name in TIMED_PHASES
        self.timed = name in TIMED_PHASES
        try:
            yield
        finally:
            self.timed = in_loop


PROGRESS = Progress()  # of this process: it trains one model at a time
