"""Sections and facts that several pages have."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from launcher.records.run import StartRecord, Verdict
from launcher.report.pages.formatting import whole
from launcher.report.pages.page import Column, Facts, Section, Styled, Table, Value

T = TypeVar("T")

BAR_WIDTH = 24  # characters of the longest bar


def model_facts(start: StartRecord) -> list[tuple[Value, Value]]:
    """What is trained, and on which device."""
    share = start.trainable / start.parameters
    lora = f" · {start.lora}" if start.lora else ""  # reports of earlier versions have none
    return [
        ("model", f"{start.model} ({start.family})"),
        ("parameters", f"{whole(start.trainable)} trainable of {whole(start.parameters)} ({share * 100:.2f} %){lora}"),
        ("device", f"{start.device} × {start.world_size}"),
        ("dtype", f"{start.dtype} · {start.quantization}"),
    ]


def note_facts(notes: Sequence[str]) -> list[tuple[Value, Value]]:
    return [(Styled("note", "warning"), note) for note in notes]


def notes(texts: Sequence[str]) -> Section:
    return Section("Notes", [Styled(text, "warning") for text in texts])


def verdicts(claims: Sequence[Verdict]) -> Section:
    """A row for each claim. The words PASS and FAIL carry the meaning, colour only repeats it."""
    rows = [
        (Styled("✓ PASS", "good"), verdict.claim, Styled(verdict.evidence, "dim"))
        if verdict.holds
        else (Styled("✗ FAIL", "alarm"), verdict.claim, Styled(verdict.evidence, "strong"))
        for verdict in claims
    ]
    held = sum(verdict.holds for verdict in claims)
    return Section("Verdicts", [Facts(rows)] if rows else [], f"{held} of {len(claims)} hold")


def elapsed(seconds: Mapping[str, float]) -> Section:
    """Seconds of each phase in their order, their share and their sum."""
    total = sum(seconds.values())
    shares = [f"{100 * s / total:.0f} %" if total > 0 else "-" for s in seconds.values()]
    columns = [
        Column("phase", [*seconds, "total"], numeric=False),
        Column("s", [f"{s:,.1f}" for s in (*seconds.values(), total)]),
        Column("share", shares),
        Column("", bars(list(seconds.values())), priority=1, numeric=False),
    ]
    return Section("Elapsed by phase", [Table(columns, footer_rows=1)] if seconds else [])


def bars(values: Sequence[float]) -> list[Value]:
    """A bar for each value, in proportion; rounded up, so that whatever is not 0 is seen."""
    longest = max(values, default=0) or 1
    return [Styled("━" * math.ceil(value / longest * BAR_WIDTH), "bar") for value in values]


def sampled(items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` items, evenly spaced, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    last = len(items) - 1
    return [items[round(i * last / (limit - 1))] for i in range(limit)]


def sample_note(shown: int, total: int, noun: str) -> str:
    """ ", 12 of 100 steps" where a table shows a sample; nothing where it shows all. `noun` is in the plural."""
    return f", {shown} of {total:,} {noun}" if shown < total else ""
