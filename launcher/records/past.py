"""Runs read back from their folders, and runs side by side: plain frozen data. Stdlib only."""

from dataclasses import asdict, dataclass, field
from typing import Any

from launcher.records.run import REPORT_SCHEMA, EvalRecord, RunPart, StepRecord


@dataclass(frozen=True)
class RunEnd:
    """status.json: how a run ended."""

    code: int
    reason: str
    rank: int
    step: int
    resumable: bool


@dataclass(frozen=True)
class UnfinishedRun:
    """What is known of a run without a report: it failed, was killed, or goes on."""

    folder: str
    steps: tuple[StepRecord, ...]
    evals: tuple[EvalRecord, ...]
    parts: tuple[RunPart, ...]
    ending: RunEnd | None  # None: it goes on, or was killed at once
    in_use: bool  # whether a process has the folder
    checkpoints: tuple[int, ...]  # their steps, the newest last
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComparisonRecord:
    """Finished runs side by side. Every tuple has one value for each run, in the order of `runs`."""

    runs: tuple[str, ...]  # their folders
    recipe: dict[str, tuple[Any, ...]]  # the keys whose values differ; None where a run has no such key
    start: dict[str, tuple[Any, ...]]  # what the runs chose or found, where it differs: device, attention, rows
    versions: dict[str, tuple[str | None, ...]]  # of Python and packages, where they differ; None: its report has none
    losses: dict[int, tuple[float, ...]]  # by step, of the steps that all have: at most 200, evenly spaced
    eval_losses: dict[int, tuple[float, ...]]
    figures: dict[str, tuple[float | None, ...]]  # units in the names; None where a run has no such figure
    verdicts: dict[str, tuple[bool | None, ...]]  # by claim; None where a run makes no such claim
    keys: int  # of the recipes, equal ones included
    notes: tuple[str, ...] = field(default=())

    def as_report(self) -> dict[str, Any]:
        """The content of report=PATH; steps are keys, as text."""
        return {"schema": REPORT_SCHEMA, "mode": "compare", **asdict(self)}
