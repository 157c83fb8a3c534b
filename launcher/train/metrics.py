"""What the device knows of each step, read late: the host asks for a step's figures when the next is under way.

The copy to the host is enqueued behind the step, into pinned memory, and the host waits for that copy alone. On a CPU
there is nothing to wait for, and nothing is late.
"""

import time
from dataclasses import dataclass

import torch

from launcher.data.loader import StepBatch
from launcher.train.step import StepResult


@dataclass(frozen=True)
class Reading:
    """The figures of one step, on the host."""

    batch: StepBatch
    loss_sum: float
    grad_norm: float
    lr: float
    skipped: bool
    step_s: float  # time between two reads, over the steps read


class Pending:
    """Steps that were enqueued and not read yet, in order."""

    def __init__(self) -> None:
        self._steps: list[tuple[StepBatch, torch.Tensor, torch.cuda.Event | None]] = []
        self._since = time.perf_counter()

    def restart(self) -> None:
        """What happened since the last read belongs to no step."""
        self._since = time.perf_counter()

    def add(self, result: StepResult, batch: StepBatch) -> None:
        """Enqueue the copy of a step's figures."""
        cuda = result.metrics.is_cuda
        host = torch.empty(result.metrics.shape, dtype=result.metrics.dtype, pin_memory=cuda)
        host.copy_(result.metrics, non_blocking=cuda)
        copied = None
        if cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._steps.append((batch, host, copied))

    def read(self, *, all: bool) -> list[Reading]:
        """Wait for the steps and forget them. On a CUDA device the last stays under way, unless `all` is asked for."""
        late = 0 if all or not self._steps or self._steps[-1][2] is None else 1
        ready, self._steps = self._steps[: len(self._steps) - late], self._steps[len(self._steps) - late :]
        if not ready:
            return []
        if ready[-1][2] is not None:
            ready[-1][2].synchronize()  # the others were copied before it
        step_s = (time.perf_counter() - self._since) / len(ready)
        self.restart()
        return [_reading(batch, host, step_s) for batch, host, _ in ready]


def _reading(batch: StepBatch, host: torch.Tensor, step_s: float) -> Reading:
    loss_sum, grad_norm, lr, skipped = host.tolist()
    return Reading(batch, loss_sum, grad_norm, lr, bool(skipped), step_s)
