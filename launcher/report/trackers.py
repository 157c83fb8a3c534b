"""Trackers: sinks that hand a run's metrics to other tools. Their packages are imported when the run has its folder."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from launcher.errors import RecipeError
from launcher.records.run import EvalRecord, Event, RunOpened, StepRecord


class TensorBoard:
    """Writes event files to `<run folder>/trackers`; one process of a run has it."""

    def __init__(self) -> None:
        self._writer: Any = None

    def show(self, event: Event) -> None:
        if isinstance(event, RunOpened):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(event.path / "trackers"), purge_step=event.step + 1)
        elif isinstance(event, StepRecord):
            self._write(event.step, loss=event.loss, lr=event.lr, grad_norm=event.grad_norm)
        elif isinstance(event, EvalRecord):
            self._write(event.step, eval_loss=event.eval_loss)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, step: int, **values: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()


TRACKERS = {"tensorboard": TensorBoard}  # by the name in run.trackers, which is also the package's


def make_trackers(names: Sequence[str]) -> list[TensorBoard]:
    """The sinks of these names. Raises RecipeError where a package is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"run.trackers must be installed; {', '.join(missing)} is not. pip install '.[trackers]'")
    return [TRACKERS[name]() for name in names]
