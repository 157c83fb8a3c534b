"""A run's folder read back into records. Imports no torch: a report of any length is there in a second or two."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from launcher.checkpoint.folder import RunFolder
from launcher.checkpoint.parts import parts_of
from launcher.errors import CheckpointError, RecipeError
from launcher.records.past import RunEnd, UnfinishedRun
from launcher.records.run import REPORT_SCHEMA, EvalRecord, RunRecord, StepRecord

T = TypeVar("T")


def read_run(run: str) -> RunRecord | UnfinishedRun:
    """The run in the folder that `run` names, by itself or by one of its files, a checkpoint or the adapter.

    Raises RecipeError: there is no run, or its files cannot be read.
    """
    path = Path(run).expanduser().absolute()
    places = [f for f in (path, *path.parents[:2]) if any((f / n).is_file() for n in ("report.json", "metrics.jsonl"))]
    if not (path.exists() and places):
        near = sorted(str(file.parent) for file in path.parent.glob("*/metrics.jsonl"))[-3:]
        there = f"\nThere are {', '.join(near)}." if near else ""
        raise RecipeError(
            f"run must be the folder of a run; {path} holds neither report.json nor metrics.jsonl.{there}"
        )
    folder = RunFolder(places[0])
    entries, notes = _metrics(folder.metrics)
    steps = _typed(tuple[StepRecord, ...], [entry for entry in entries if "loss" in entry], folder.metrics)
    evals = _typed(tuple[EvalRecord, ...], [entry for entry in entries if "eval_loss" in entry], folder.metrics)
    ending = _ending(folder)
    if folder.report.is_file():
        return _finished(folder, steps, evals, notes=[*_endings(ending), *notes])
    saved = [bundle.name.removeprefix("step-") for bundle in folder.checkpoints.glob("step-*[0-9]")]
    return UnfinishedRun(
        str(folder.path), steps, evals, tuple(parts_of(folder)), ending, in_use=_in_use(folder),
        checkpoints=tuple(sorted(int(step) for step in saved if step.isdecimal())), notes=tuple(notes),
    )  # fmt: skip


def _finished(
    folder: RunFolder, steps: tuple[StepRecord, ...], evals: tuple[EvalRecord, ...], *, notes: list[str]
) -> RunRecord:
    """The record that the report was written from, with the places where the folder is now."""
    file = folder.report
    report = _json(file, file.read_text(encoding="utf-8", errors="replace"))
    if (schema := report.get("schema")) != REPORT_SCHEMA:
        raise _unreadable(file, f"its schema is {schema!r}, not {REPORT_SCHEMA}")
    try:
        ranks = [_flat(rank) for rank in report["ranks"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise _unreadable(file, f"ranks: {type(error).__name__}: {error}") from None
    loss = report.get("loss")
    evaluated = loss.get("eval_adapter") if isinstance(loss, dict) else None
    record = _typed(
        RunRecord, {**report, "ranks": ranks, "steps": steps, "evals": evals, "eval_adapter": evaluated}, file
    )
    if not record.ranks or not {"train", "model"} <= record.recipe.keys():
        raise _unreadable(file, "it has no ranks or no whole recipe")
    if not steps:
        notes.append(f"{folder.metrics.name} has no step: losses and curves are left out")
    elif steps[-1].step > record.start.steps:
        notes.append(f"the run went on to step {steps[-1].step:,} after this report of step {record.start.steps:,}")
    return replace(
        record,
        start=replace(record.start, run_dir=str(folder.path)),
        adapter=str(folder.adapter) if record.adapter and folder.adapter.is_dir() else None,
        notes=(*record.notes, *notes),
    )


def _flat(rank: dict[str, Any]) -> dict[str, Any]:
    """The fields of a RankRecord from a rank's entry in the report."""
    vram, step_ms = rank["vram"], rank["step_ms"]
    measured = {f"vram_{name}": vram[name] for name in ("before_mib", "after_mib", "peak_mib")}
    times = {f"step_ms_{name}": step_ms[name] for name in ("median", "p90")}
    return {**{key: _number(value) for key, value in (rank | measured | times).items()}, "vram": vram["phases"]}


def _metrics(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of metrics.jsonl; and a note, where the last was cut by the end of the machine."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    notes = []
    if lines and not lines[-1].endswith("}"):
        lines.pop()
        notes.append(f"the last line of {file.name} is cut: it is left out")
    entries = [_json(file, line, f"line {number}: ") for number, line in enumerate(lines, 1)]
    return [{key: _number(value) for key, value in entry.items()} for entry in entries], notes


def _ending(folder: RunFolder) -> RunEnd | None:
    if not folder.status.is_file():
        return None
    status = _json(folder.status, folder.status.read_text(encoding="utf-8", errors="replace"))
    return _typed(RunEnd, status, folder.status)


def _endings(ending: RunEnd | None) -> Iterator[str]:
    """How a run with a report ended, where that was not well."""
    if ending is None:
        yield "there is no status.json: the run goes on, or it was killed"
    elif ending.code:
        yield f"ended with code {ending.code} after step {ending.step:,}: {ending.reason}"


def _in_use(folder: RunFolder) -> bool:
    try:
        folder.check_unused()
    except CheckpointError:
        return True
    return False


def _number(value: Any) -> Any:
    """NaN for null, which stands for what JSON lacks."""
    return math.nan if value is None else value


def _json(file: Path, text: str, where: str = "") -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(file, f"{where}{error}") from None
    if not isinstance(content, dict):
        raise _unreadable(file, f"{where}it holds no object")
    return content


def _typed(kind: type[T], content: Any, file: Path) -> T:
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _unreadable(file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _unreadable(file: Path, reason: str) -> RecipeError:
    return RecipeError(
        f"{file.name} of a run must be whole and of this version; {file} is not: {reason}.\n"
        "Use the version that wrote it, or another run."
    )
