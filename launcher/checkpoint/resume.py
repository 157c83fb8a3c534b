"""Finds what a run goes on from: a checkpoint of the run folder, and the records of the steps before it."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from launcher.checkpoint.bundle import State, bundles_of, clean, newest_state, read_bundle, remove, step_of
from launcher.checkpoint.files import write_text
from launcher.checkpoint.folder import RunFolder
from launcher.checkpoint.parts import begin_part
from launcher.checkpoint.run_files import metrics_line
from launcher.records.run import EvalRecord, RunPart, StepRecord

Records = list[StepRecord | EvalRecord]


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from. `records`: of the steps until then, in order; `lost_s`: seconds of steps after it."""

    bundle: Path
    state: State
    records: Records
    lost_s: float
    notes: tuple[str, ...]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return step_of(self.bundle)


def open_folder(folder: RunFolder, resume: str) -> Resumed | None:
    """Take `folder` for this process, as run.resume says; what there is to go on from, or None for a new run.

    Raises CheckpointError and RecipeError as RunFolder.create does, where the folder is in use, and where there is no
    whole checkpoint.
    """
    if resume == "never" or (resume == "auto" and not folder.has_checkpoints):
        _, lost = _records(folder.metrics, step=0)
        folder.create(resume=resume)
        clean(folder.checkpoints)
        begin_part(folder, (), step=0, lost_s=_seconds(lost))
        return None
    folder.check(resume=resume)
    folder.lock()
    clean(folder.checkpoints)
    notes: list[str] = []
    path = Path(resume).absolute()
    if resume != "auto" and path != folder.path:
        bundle, state = path, read_bundle(path)
    else:
        bundle, state, notes = newest_state(folder.checkpoints)
    step = step_of(bundle)
    until, after = _records(folder.metrics, step=step)
    missing = step - sum(isinstance(record, StepRecord) for record in until)
    notes += [f"{folder.metrics.name} lacks {missing} of the {step} steps before the checkpoint"] if missing else []
    return Resumed(bundle, state, until, _seconds(after), tuple(notes))


def cut_back(folder: RunFolder, resumed: Resumed) -> None:
    """Cut the files of the run to what it goes on from: metrics.jsonl to its steps; the checkpoints after it go. Begins
    a part of the run."""
    for later in bundles_of(folder.checkpoints):
        if step_of(later) > resumed.step:
            remove(later)
    write_text(folder.metrics, "".join(map(metrics_line, resumed.records)))
    if folder.samples.exists():
        lines = folder.samples.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_text(folder.samples, "".join(line for line in lines if _sample_step(line) <= resumed.step))
    folder.forget_ending()
    saved = [RunPart(**part) for part in resumed.state["run"]["parts"]]
    begin_part(folder, saved, step=resumed.step, lost_s=resumed.lost_s)


def _records(metrics: Path, *, step: int) -> tuple[Records, Records]:
    """The records of metrics.jsonl until `step` and after it; a line that a kill tore is left out."""
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.exists() else []
    records = [record for line in lines if (record := _record(line)) is not None]
    return [r for r in records if r.step <= step], [r for r in records if r.step > step]


def _sample_step(line: str) -> float:
    """The step of a line of samples.jsonl; infinity where a kill tore it."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _seconds(records: Records) -> float:
    return sum(record.step_s for record in records if isinstance(record, StepRecord))


def _record(line: str) -> StepRecord | EvalRecord | None:
    """The record of a line; None where a kill tore it."""
    try:
        values: dict[str, Any] = json.loads(line)
        kind: Any = EvalRecord if "eval_loss" in values else StepRecord
        known = {field.name for field in fields(kind)}
        numbers = {key: math.inf if value is None else value for key, value in values.items() if key in known}
        if type(numbers["step"]) is not int or not all(isinstance(value, int | float) for value in numbers.values()):
            return None
        return cast(StepRecord | EvalRecord, kind(**numbers))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
