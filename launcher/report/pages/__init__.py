"""Page builders: a record in, a page of titles, tables and texts out. They know no medium; a renderer draws it."""

from collections.abc import Callable
from typing import Any

from launcher.records.answers import Answered
from launcher.records.bench import BenchRecord
from launcher.records.check import CheckRecord
from launcher.records.evaluation import EvaluationRecord
from launcher.records.export import ExportRecord
from launcher.records.parity import ParityRecord
from launcher.records.past import ComparisonRecord, UnfinishedRun
from launcher.records.preview import PreviewRecord
from launcher.records.push import PushRecord
from launcher.records.run import RunRecord, StartRecord
from launcher.report.pages.answers import answers_page, speed
from launcher.report.pages.bench import bench_page
from launcher.report.pages.check import check_page
from launcher.report.pages.comparison import comparison_page
from launcher.report.pages.evaluation import evaluation_page
from launcher.report.pages.export import export_page
from launcher.report.pages.page import Page
from launcher.report.pages.parity import parity_page
from launcher.report.pages.preview import preview_page
from launcher.report.pages.push import push_page
from launcher.report.pages.run import run_page
from launcher.report.pages.start import start_page
from launcher.report.pages.unfinished import unfinished_page

__all__ = ["BUILDERS", "page_of", "speed"]

BUILDERS: dict[type, Callable[[Any], Page]] = {
    StartRecord: start_page,
    RunRecord: run_page,
    ParityRecord: parity_page,
    BenchRecord: bench_page,
    PreviewRecord: preview_page,
    ExportRecord: export_page,
    Answered: answers_page,
    CheckRecord: check_page,
    PushRecord: push_page,
    EvaluationRecord: evaluation_page,
    UnfinishedRun: unfinished_page,
    ComparisonRecord: comparison_page,
}


def page_of(record: object) -> Page | None:
    """The page of a record; None for anything that has no page."""
    builder = BUILDERS.get(type(record))
    return builder(record) if builder else None
