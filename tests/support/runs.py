"""Runs in this process, by their events."""

from typing import Any

from launcher.records.run import Event, RunRecord
from launcher.train.loop import RunHistory, training
from tests.conftest import request_for


def events_of(recipe: Any, history: RunHistory | None = None) -> list[Event]:
    return list(training(request_for(recipe), history or RunHistory()))


def record_of(recipe: Any) -> RunRecord:
    return next(event for event in events_of(recipe) if isinstance(event, RunRecord))
