"""Reads the metrics of each step late: the host asks for those of a step when the next one is already running.

The copy to the host is enqueued behind the step, into pinned memory, and the host waits for that copy alone. On a CPU
there is nothing to wait for, and every step is read at once.
"""

import time
from dataclasses import dataclass

import torch

from launcher.data.loader import StepBatch
from launcher.train.step import StepResult


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one step, on the host."""

    batch: StepBatch
    loss_sum: float
    grad_norm: float
    lr: float
    skipped: bool
    stop_votes: float
    step_s: float  # time since the read before, divided by the steps read


class MetricsReader:
    """Holds the steps that were enqueued and not read yet, in order."""

    def __init__(self) -> None:
        self._unread: list[tuple[StepBatch, torch.Tensor, torch.cuda.Event | None]] = []
        self._last_read = time.perf_counter()

    def restart(self) -> None:
        """Leave the time since the last read out of the next step's."""
        self._last_read = time.perf_counter()

    def add(self, result: StepResult, batch: StepBatch) -> None:
        """Enqueue the copy of a step's metrics."""
        self._unread.append((batch, *copy_to_host(result.metrics)))

    def read(self, *, all: bool) -> list[StepMetrics]:
        """Wait for the unread steps and forget them. On a CUDA device the last one is left running, unless `all`."""
        still_running = 0 if all or not self._unread or self._unread[-1][2] is None else 1
        end = len(self._unread) - still_running
        ready, self._unread = self._unread[:end], self._unread[end:]
        if not ready:
            return []
        if ready[-1][2] is not None:
            ready[-1][2].synchronize()  # the others were copied before it
        step_s = (time.perf_counter() - self._last_read) / len(ready)
        self.restart()
        return [_metrics(batch, host, step_s) for batch, host, _ in ready]


def copy_to_host(metrics: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Enqueue a copy, into pinned memory, and the event that ends it; no event on a CPU, where the copy is made."""
    cuda = metrics.is_cuda
    host = torch.empty(metrics.shape, dtype=metrics.dtype, pin_memory=cuda)
    host.copy_(metrics, non_blocking=cuda)
    copied = None
    if cuda:
        copied = torch.cuda.Event()
        copied.record()
    return host, copied


def _metrics(batch: StepBatch, host: torch.Tensor, step_s: float) -> StepMetrics:
    loss_sum, grad_norm, lr, skipped, stop_votes = host.tolist()
    return StepMetrics(batch, loss_sum, grad_norm, lr, bool(skipped), stop_votes, step_s)
