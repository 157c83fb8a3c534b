"""mode=evaluate as a page: the figures of the adapter, of the base beside it, and answers beside the data's own."""

import textwrap

from launcher.records.evaluation import EvaluationRecord, ModelFigures
from launcher.report.pages.formatting import counted, counts
from launcher.report.pages.page import Column, Page, Section, Table, Value
from launcher.report.pages.sections import elapsed, note_facts, verdicts

CELL_CHARACTERS = 100  # characters of a prompt or an answer; report=PATH has all


def evaluation_page(record: EvaluationRecord) -> Page:
    """What was measured on, then the figures."""
    return Page(
        title="evaluate",
        facts=_facts(record),
        sections=[elapsed(record.elapsed_s), _answers(record), _figures(record), *_verdicts(record)],
    )


def _facts(record: EvaluationRecord) -> list[tuple[Value, Value]]:
    size = [counted(record.documents, "document"), counted(record.supervised_tokens, "supervised token")]
    rows = [] if record.rows is None else [counted(record.rows, "row")]
    facts: list[tuple[Value, Value]] = [
        ("adapter", record.run),
        ("base", record.base),
        ("device", f"{record.device}, {record.dtype}"),
        ("data", record.data),
        ("size", f"{', '.join(rows + size)} of {record.tokens:,}"),
    ]
    if record.loss_on:
        facts.append(("loss on", counts(record.loss_on, "row")))
    return facts + note_facts(record.notes)


def _figures(record: EvaluationRecord) -> Section:
    sides = {"with the adapter": record.trained}
    if record.without_adapter:
        sides["base alone"] = record.without_adapter
    columns = [Column("", ["loss", "perplexity", "token accuracy"], numeric=False)]
    columns += [Column(name, _cells(figures)) for name, figures in sides.items()]
    return Section("Figures", [Table(columns)], "mean over the supervised tokens")


def _cells(figures: ModelFigures) -> list[Value]:
    return [f"{figures.loss:.5f}", f"{figures.perplexity:,.3f}", f"{figures.accuracy:.4f}"]


def _answers(record: EvaluationRecord) -> Section:
    answers = record.answers
    texts = {
        "prompt": [answered.prompt for answered in answers],
        "expected": [answered.expected or "" for answered in answers],
        "answer": [answered.trained.text for answered in answers],
    }
    if record.without_adapter:
        texts["base alone"] = [answered.base.text if answered.base else "" for answered in answers]
    columns = [
        Column(name, [textwrap.shorten(text, CELL_CHARACTERS, placeholder=" …") for text in column], numeric=False)
        for name, column in texts.items()
    ]
    return Section("Answers", [Table(columns)] if answers else [], "greedy")


def _verdicts(record: EvaluationRecord) -> list[Section]:
    return [verdicts(record.verdicts)] if record.verdicts else []
