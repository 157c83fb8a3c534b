"""When a run saves a checkpoint, and what is in it: the state of train/state.py and the history of the run.

A save copies the device's state between two steps; a thread writes it behind the next ones (checkpoint/writer.py).
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.checkpoint.adapter import save_tensors, saved_parameters
from launcher.checkpoint.bundle import State
from launcher.checkpoint.resume import Resumed
from launcher.checkpoint.writer import BundleWriter
from launcher.recipe.field_types import interval_s
from launcher.records.run import RunPart
from launcher.runtime.ranks import broadcast, failing_together
from launcher.train.host_copies import HostCopies
from launcher.train.rescue import rescuing
from launcher.train.schedule_free import evaluated_adapters
from launcher.train.setup import Worker


class SaveSchedule:
    """Which steps save: every so many, or after so many seconds, which rank 0 measures for all ranks."""

    def __init__(self, save_every: int | str, *, step: int) -> None:
        timed = isinstance(save_every, str)
        self._interval_s = (interval_s(save_every) or 0) if isinstance(save_every, str) else 0
        self._every = 0 if timed else int(save_every)
        self._saved_s, self._looked_at, self._next_look = time.monotonic(), step, step + 1

    def due(self, step: int) -> bool:
        """Whether to save after this step; every rank asks after every step, and all get the same answer."""
        if not self._interval_s:
            return bool(self._every) and step % self._every == 0
        if step < self._next_look:
            return False
        due, self._next_look = broadcast(self._look(step))
        return bool(due)

    def _look(self, step: int) -> tuple[bool, int]:
        """Whether the time has come, and at which step to look again: halfway to it by the speed so far."""
        past_s = time.monotonic() - self._saved_s
        if past_s >= self._interval_s:
            self._saved_s, self._looked_at = time.monotonic(), step
            return True, step + 1
        steps = max(1, step - self._looked_at)
        by_speed = round(steps * (self._interval_s - past_s) / (2 * past_s))
        return False, step + max(1, min(by_speed, 2 * steps))  # the first steps tell little of the speed


class Checkpoints:
    """The checkpoints of one run; every rank has them and calls them alike. train.save_every=0: none is ever saved."""

    def __init__(self, worker: Worker, resumed: Resumed | None) -> None:
        train, folder = worker.recipe.train, worker.folder
        self._worker = worker
        self._schedule = SaveSchedule(train.save_every, step=worker.state.step)
        self._enabled = train.save_every != 0
        self._saved_step: int | None = worker.state.step if resumed else None
        self._writer: BundleWriter | None = None
        self._copies = HostCopies()
        if worker.rank_info.is_main and self._enabled:
            self._writer = BundleWriter(folder.checkpoints, keep=train.keep, save_adapter=self._save_adapter)
        names = {id(parameter): name for name, parameter in worker.built.peft.named_parameters()}
        self._peft_names = {name: names[id(p)] for name, p in saved_parameters(worker.built.packed).items()}
        self.parts = worker.parts

    def due(self, step: int) -> bool:
        """Whether to save after this step. Raises the error of the last save, once it has failed."""
        if self._writer is not None:
            with rescuing(self._worker):
                self._writer.check()
        return self._enabled and self._schedule.due(step)

    def save(self, eval_losses: Mapping[int, float]) -> None:
        """Save the state as it is now, unless that is done. `eval_losses`, by step: which of the run is the best."""
        step = self._worker.state.step
        if not self._enabled or self._saved_step == step:
            return
        with self._worker.clock.phase("checkpoint"):
            self._finish_write()  # it reads the memory that the copy uses again
            state, wait = self._worker.state.begin_copy(self._copies)
            self._saved_step = step
            if self._writer is not None:
                content = {"state": state, "run": self._history(step)}
                self._writer.write(content, step=step, eval_losses=eval_losses, wait=wait)

    def finish(self) -> str:
        """Wait until the last save is on the disk, on every rank; what to say of it."""
        with self._worker.clock.phase("checkpoint"):
            self._finish_write()
        if self._saved_step is None:
            return "no checkpoint was saved: train.save_every is off"
        folder = self._worker.folder.path
        return f"step {self._saved_step} is saved; with run.output_dir={folder} and no run.resume it goes on from there"

    def _finish_write(self) -> None:
        """Every rank raises the error that rank 0's write met."""
        with failing_together(Exception), rescuing(self._worker):
            if self._writer is not None:
                self._writer.finish()

    def close(self) -> None:
        """Let the write that goes on come to its end, however the training ended; its error would hide that."""
        if self._writer is not None:
            self._writer.close()

    def parts_until(self, step: int) -> tuple[RunPart, ...]:
        """The parts of the run, the present one ending with `step`."""
        return (*self.parts[:-1], replace(self.parts[-1], last_step=step))

    def _history(self, step: int) -> dict[str, Any]:
        return {"parts": [vars(part) for part in self.parts_until(step)]}

    def _save_adapter(self, folder: Path, state: State) -> None:
        training = state["state"]["training"]
        adapters = evaluated_adapters(training, self._worker.recipe.train) | training.get("start", {})
        tensors = {self._peft_names[name]: tensor for name, tensor in adapters.items()}
        save_tensors(self._worker.built.peft, tensors, folder)
