"""Runs in this process, by their events and by what they leave."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.checkpoint.run_files import RunFiles
from launcher.records.run import Event, RunRecord, StepRecord
from launcher.train.history import RunHistory
from launcher.train.loop import training
from tests.conftest import request_for


def events_of(recipe: Any, history: RunHistory | None = None) -> list[Event]:
    return list(training(request_for(recipe), history or RunHistory()))


def record_of(recipe: Any) -> RunRecord:
    return next(event for event in events_of(recipe) if isinstance(event, RunRecord))


def trained(
    recipe: Any,
    *,
    until: int | None = None,
    act: Callable[[], None] | None = None,
    history: RunHistory | None = None,
) -> list[Event]:
    """Train and write the run's files; `act` after the record of step `until`, or an end there as by a kill."""
    files, events = RunFiles(0), list[Event]()
    running = training(request_for(recipe), history or RunHistory())
    for event in running:
        files.show(event)
        events.append(event)
        if isinstance(event, StepRecord) and event.step == until:
            if act is None:
                running.close()
                return events
            act()
    files.end(code=0, reason="done")
    return events


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured by a clock or a meter."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("step_s", "vram_mib")} for line in read]


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()
