"""Runs read back from their folders, and runs side by side: plain frozen data. Stdlib only."""

from dataclasses import asdict, dataclass, field
from typing import Any

from launcher.records.explanation import Explanation
from launcher.records.run import REPORT_SCHEMA, EvalRecord, RunPart, StartRecord, StepRecord, losses_of


@dataclass(frozen=True)
class RunEnd:
    """status.json: how a run ended."""

    code: int
    reason: str
    rank: int
    step: int
    resumable: bool
    explanations: tuple[Explanation, ...] = ()  # where the compile contract broke


@dataclass(frozen=True)
class UnfinishedRun:
    """What is known of a run that did not come to its end: it failed, was killed, or goes on."""

    folder: str
    steps: tuple[StepRecord, ...]
    evals: tuple[EvalRecord, ...]
    parts: tuple[RunPart, ...]
    ending: RunEnd | None  # None: it goes on, or was killed at once
    in_use: bool  # whether a process has the folder
    checkpoints: tuple[int, ...]  # their steps, the newest last
    notes: tuple[str, ...] = ()
    start: StartRecord | None = None  # None: it did not come so far, or left no report
    recipe: dict[str, Any] = field(default_factory=dict)  # resolved; empty: it left no report
    recipe_origins: dict[str, str] = field(default_factory=dict)

    def as_report(self) -> dict[str, Any]:
        """report.json of a run whose compile contract broke: as a RunRecord's, as far as it goes; `ending` tells it
        from that of a run which came to its end."""
        return {
            "schema": REPORT_SCHEMA,
            "recipe": self.recipe,
            "recipe_origins": self.recipe_origins,
            "start": asdict(self.start) if self.start else None,
            "ending": asdict(self.ending) if self.ending else None,
            "loss": losses_of(self.steps, self.evals),
            "parts": [asdict(part) for part in self.parts],
            "notes": self.notes,
        }


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
