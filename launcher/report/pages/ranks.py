"""One row per rank, an alarm where ranks differ that must not, and the reasons behind each count."""

from collections.abc import Callable, Iterator, Sequence

from launcher.records.run import CompileRecord, RankRecord
from launcher.report.pages.explanations import explanations
from launcher.report.pages.formatting import counted, extent, on_cpu
from launcher.report.pages.page import Column, Facts, Item, Section, Styled, Table, Value, flagged

DEVICE_SHOWN = 22  # characters of a device's name; the start panel has the whole
HASH_SHOWN = 8  # characters of a graph hash; where ranks differ the whole is shown

# Every rank runs the same plan on the same shapes: in these columns a difference is a defect of the run.
MUST_AGREE: tuple[tuple[str, Callable[[CompileRecord], object]], ...] = (
    ("graph hash", lambda c: c.graph_hash),
    ("planned graphs", lambda c: c.planned_graphs),
    ("breaks", lambda c: c.graph_breaks),
    ("recompiles", lambda c: c.recompiles),
)


def rank_sections(ranks: Sequence[RankRecord]) -> Iterator[Section]:
    """The table of ranks, with min and max under it when there are several; then every disagreement."""
    items: list[Item] = [Table(_columns(ranks), footer_rows=2 if len(ranks) > 1 else 0)]
    if regions := ranks[0].compile.graphs_by_region:
        counts = ", ".join(f"{name} {count}" for name, count in regions.items())
        items.append(Styled(f"graphs by region: {counts}", "dim"))
        items.append(Styled(_insides(ranks[0].compile), "dim"))
    hits, misses = [r.compile.cache_hits for r in ranks], [r.compile.cache_misses for r in ranks]
    if any((*hits, *misses)):  # backward passes are graphs of their own here
        items.append(Styled(f"code of graphs: {extent(hits)} from the cache, {extent(misses)} generated", "dim"))
    yield Section("Ranks", items, "counts are per process")
    for name, value in MUST_AGREE:
        values = [value(r.compile) for r in ranks]
        if len(set(values)) > 1:
            rows = [(f"rank {r.rank}", Styled(str(v), "bad")) for r, v in zip(ranks, values, strict=True)]
            yield Section(f"✗ RANKS DIFFER: {name}", [Facts(rows)], style="alarm")


def event_sections(ranks: Sequence[RankRecord]) -> Iterator[Section]:
    """Why there were breaks, recompiles, limit hits and fallbacks: in plain words, then in dynamo's."""
    compiled = [(r.rank, r.compile) for r in ranks]
    yield explanations([(rank, c.explanations) for rank, c in compiled])
    yield _reasons("Graph breaks", [(rank, c.graph_breaks, c.graph_break_reasons) for rank, c in compiled])
    yield _reasons("Recompiles", [(rank, c.recompiles, c.recompile_reasons) for rank, c in compiled])
    yield _reasons("Runs uncompiled", [(rank, len(c.fallbacks), c.fallbacks) for rank, c in compiled])
    hits = [(rank, c.limit_hits, [counted(c.limit_hits, "hit")] if c.limit_hits else []) for rank, c in compiled]
    yield _reasons("Recompile limit hits", hits)


def _insides(compiled: CompileRecord) -> str:
    """What the graphs hold, those that differ only in shape or gradient mode once: nodes, and calls of opaque operators
    by name."""
    insides: dict[str, None] = {}
    for graph in compiled.graphs:
        names = ", ".join(f"{name} {count}" for name, count in graph.opaque.items())
        opaque = f", of them {counted(sum(graph.opaque.values()), 'opaque call')} ({names})" if names else ""
        insides[f"{graph.region} {counted(graph.nodes, 'node')}{opaque}"] = None
    return f"inside the graphs: {' · '.join(insides)}"


def _columns(ranks: Sequence[RankRecord]) -> list[Column]:
    memory = "RSS" if on_cpu(ranks[0].device) else "VRAM"
    compiled = [r.compile for r in ranks]
    planned = [c.planned_graphs for c in compiled]
    extremes = ("min", "max") if len(ranks) > 1 else ()
    devices = [r.device if len(r.device) <= DEVICE_SHOWN else r.device[: DEVICE_SHOWN - 1] + "…" for r in ranks]
    return [
        Column("rank", [*(str(r.rank) for r in ranks), *extremes]),
        Column("device", devices, priority=4, numeric=False),
        Column("planned\ngraphs", [*map(_planned, compiled), *map(str, _extremes(planned))]),
        _figures("breaks", [c.graph_breaks for c in compiled], event=True),
        _figures("recom-\npiles", [c.recompiles for c in compiled], event=True),
        _figures("compile\nfwd s", [c.forward_s for c in compiled], priority=2, decimals=1),
        _figures("compile\nbwd s", [c.backward_s for c in compiled], priority=2, decimals=1),
        _figures("cache\nhits", [c.cache_hits for c in compiled], priority=6),
        Column("graph\nhash", [c.graph_hash[:HASH_SHOWN] for c in compiled]),
        _figures(f"{memory}\nbefore\nMiB", [r.vram_before_mib for r in ranks], priority=5),
        _figures(f"{memory}\nafter\nMiB", [r.vram_after_mib for r in ranks], priority=3),
        _figures(f"{memory}\npeak\nMiB", [r.vram_peak_mib for r in ranks], priority=1),
        _figures("tok/s", [r.tokens_per_s for r in ranks]),
    ]


def _figures(
    header: str, values: Sequence[float], priority: int = 0, *, decimals: int = 0, event: bool = False
) -> Column:
    """A figure of each rank and, of several, the least and the greatest. An `event` is bad unless it is 0."""
    texts = [f"{value:,.{decimals}f}" for value in (*values, *_extremes(values))]
    return Column(header, [flagged(text, not event or text == "0") for text in texts], priority)


def _extremes(values: Sequence[float]) -> list[float]:
    return [min(values), max(values)] if len(values) > 1 else []


def _planned(compiled: CompileRecord) -> Value:
    """The graphs compiled in warm-up; "2 of 3" where the plan asked for another number."""
    planned, expected = compiled.planned_graphs, compiled.expected_graphs
    return str(planned) if planned == expected else Styled(f"{planned} of {expected}", "bad")


def _reasons(title: str, events: Sequence[tuple[int, int, Sequence[str]]]) -> Section:
    """Events are (rank, count, reasons). A reason that several ranks give is shown once, with all of them."""
    ranks_of: dict[str, dict[int, None]] = {}
    for rank, count, reasons in events:
        for reason in reasons or (("counted, but no reason was recorded",) if count else ()):
            ranks_of.setdefault(reason, {})[rank] = None
    rows = [(Styled(f"rank {', '.join(map(str, ranks))}", "bad"), reason) for reason, ranks in ranks_of.items()]
    return Section(title, [Facts(rows)] if rows else [], counted(sum(count for _, count, _ in events), "event"))
