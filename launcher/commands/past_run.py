"""A run's folder read back into records. Imports no torch: a report of any length is there in a second or two."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from launcher.checkpoint.files import damaged, read_object
from launcher.checkpoint.folder import RunFolder, bundles_of, run_folder_of, step_of
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
    found = run_folder_of(path)
    if not (path.exists() and found):
        near = sorted(str(file.parent) for file in path.parent.glob("*/metrics.jsonl"))[-3:]
        there = f"\nThere are {', '.join(near)}." if near else ""
        raise RecipeError(
            f"run must be the folder of a run; {path} holds neither report.json, metrics.jsonl nor status.json.{there}"
        )
    folder = RunFolder(found)
    entries, notes = _metrics(folder.metrics)
    steps = _typed(tuple[StepRecord, ...], [entry for entry in entries if "loss" in entry], folder.metrics)
    evals = _typed(tuple[EvalRecord, ...], [entry for entry in entries if "eval_loss" in entry], folder.metrics)
    ending = _ending(folder)
    left: dict[str, Any] = {}
    if folder.has_unfinished_report:
        report = _report(folder.report)
        if isinstance(start := report.get("start"), dict):
            start["run_dir"] = str(folder.path)
        left = {name: report[name] for name in ("start", "recipe", "recipe_origins") if report.get(name)}
    elif folder.report.is_file():
        return _finished(folder, steps, evals, notes=[*_endings(ending), *notes])
    unfinished = UnfinishedRun(
        str(folder.path), steps, evals, tuple(parts_of(folder)), ending, in_use=_in_use(folder),
        checkpoints=tuple(sorted(map(step_of, bundles_of(folder.checkpoints)))), notes=tuple(notes),
    )  # fmt: skip
    return _typed(UnfinishedRun, {**vars(unfinished), **left}, folder.report) if left else unfinished


def _finished(
    folder: RunFolder, steps: tuple[StepRecord, ...], evals: tuple[EvalRecord, ...], *, notes: list[str]
) -> RunRecord:
    """The record that the report was written from, with the places where the folder is now."""
    file = folder.report
    report = _report(file)
    try:
        ranks = [_flat(rank) for rank in report["ranks"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(file, f"ranks: {type(error).__name__}: {error}") from None
    loss = report.get("loss")
    evaluated = loss.get("eval_adapter") if isinstance(loss, dict) else None
    record = _typed(
        RunRecord, {**report, "ranks": ranks, "steps": steps, "evals": evals, "eval_adapter": evaluated}, file
    )
    if not record.ranks or not {"train", "model"} <= record.recipe.keys():
        raise damaged(file, "it has no ranks or no whole recipe")
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


def _report(file: Path) -> dict[str, Any]:
    report = read_object(file)
    if (schema := report.get("schema")) != REPORT_SCHEMA:
        raise damaged(file, f"its schema is {schema!r}, not {REPORT_SCHEMA}")
    return report


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
    entries = [read_object(file, line, f"line {number}: ") for number, line in enumerate(lines, 1)]
    return [{key: _number(value) for key, value in entry.items()} for entry in entries], notes


def _ending(folder: RunFolder) -> RunEnd | None:
    if not folder.status.is_file():
        return None
    return _typed(RunEnd, read_object(folder.status), folder.status)


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


def _typed(kind: type[T], content: Any, file: Path) -> T:
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise damaged(file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
