"""One row per rank, a shout where ranks differ that must not, and the reasons behind each count."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from launcher.records.run import CompileRecord, RankRecord
from launcher.report.figures import counted, literal, on_cpu, whole
from launcher.report.layout import EVENT, Column, heading, indented, pairs, print_table

DEVICE_SHOWN = 22  # characters of a device's name in the table
HASH_SHOWN = 8  # characters of a graph hash in the table; where ranks differ the whole is printed

# Every rank runs the same plan on the same shapes: in these columns a difference is a defect of the run.
MUST_AGREE: tuple[tuple[str, Callable[[CompileRecord], object]], ...] = (
    ("graph hash", lambda c: c.graph_hash),
    ("planned graphs", lambda c: c.planned_graphs),
    ("breaks", lambda c: c.graph_breaks),
    ("recompiles", lambda c: c.recompiles),
)


def print_ranks(console: Console, ranks: Sequence[RankRecord]) -> None:
    """The table of ranks, with min and max under it when there are several, and every disagreement."""
    heading(console, "Ranks", "counts are per process")
    print_table(console, rank_columns(ranks), footer_rows=2 if len(ranks) > 1 else 0)
    regions = ", ".join(f"{name} {count}" for name, count in ranks[0].compile.graphs_by_region.items())
    if regions:
        indented(console, Text.assemble(("graphs by region: ", "dim"), literal(regions, "dim")))
    print_disagreements(console, ranks)


def rank_columns(ranks: Sequence[RankRecord]) -> list[Column]:
    """What is shown of each rank; priorities say what a narrow console leaves out first."""
    memory = "RSS" if on_cpu(ranks[0].device) else "VRAM"
    compiled = [r.compile for r in ranks]
    several = len(ranks) > 1
    return [
        _words("rank", [Text(str(r.rank)) for r in ranks], ("min", "max") if several else ()),
        _words("device", [_device(r.device) for r in ranks], ("", "") if several else (), priority=4, numeric=False),
        _planned_graphs(compiled),
        _counts("breaks", [c.graph_breaks for c in compiled], event=True),
        _counts("recom-\npiles", [c.recompiles for c in compiled], event=True),
        _seconds("compile\nfwd s", [c.forward_s for c in compiled], priority=2),
        _seconds("compile\nbwd s", [c.backward_s for c in compiled], priority=2),
        _counts("cache\nhits", [c.cache_hits for c in compiled], priority=6),
        _words("graph\nhash", [literal(c.graph_hash[:HASH_SHOWN]) for c in compiled], ("", "") if several else ()),
        _counts(f"{memory}\nbefore\nMiB", [r.vram_before_mib for r in ranks], priority=5),
        _counts(f"{memory}\nafter\nMiB", [r.vram_after_mib for r in ranks], priority=3),
        _counts(f"{memory}\npeak\nMiB", [r.vram_peak_mib for r in ranks], priority=1),
        _counts("tok/s", [r.tokens_per_s for r in ranks]),
    ]


def print_disagreements(console: Console, ranks: Sequence[RankRecord]) -> None:
    """For each column in which ranks differ that must not: a loud line, then every rank's value on its own."""
    for name, value in MUST_AGREE:
        values = [value(r.compile) for r in ranks]
        if len(set(values)) > 1:
            console.print()
            console.print(Text(f" ✗ RANKS DIFFER: {name} ", "bold white on red"))
            rows = zip(ranks, values, strict=True)
            console.print(pairs([(Text(f"rank {r.rank}", "bold"), literal(v, EVENT)) for r, v in rows]))


def print_events(console: Console, ranks: Sequence[RankRecord]) -> None:
    """Why there were breaks, recompiles, limit hits and fallbacks; nothing where there were none."""
    _reasons(console, "Graph breaks", [(r.rank, r.compile.graph_breaks, r.compile.graph_break_reasons) for r in ranks])
    _reasons(console, "Recompiles", [(r.rank, r.compile.recompiles, r.compile.recompile_reasons) for r in ranks])
    fallbacks = [(r.rank, len(r.compile.fallbacks), r.compile.fallbacks) for r in ranks]
    _reasons(console, "Runs uncompiled", fallbacks)
    hits = [(Text(f"rank {r.rank}"), Text(whole(r.compile.limit_hits), EVENT)) for r in ranks if r.compile.limit_hits]
    if hits:
        heading(console, "Recompile limit hits")
        console.print(pairs(hits))


def _reasons(console: Console, title: str, events: Sequence[tuple[int, int, Sequence[str]]]) -> None:
    """Events are (rank, count, reasons). The same reason on several ranks is printed once, with all of them."""
    ranks_of: dict[str, list[int]] = {}
    for rank, count, reasons in events:
        for reason in reasons or (("counted, but no reason was recorded",) if count else ()):
            ranks_of.setdefault(reason, []).append(rank)
    if ranks_of:
        heading(console, title, counted(sum(count for _, count, _ in events), "event"))
        rows = [(Text(_rank_names(ranks), EVENT), literal(reason)) for reason, ranks in ranks_of.items()]
        console.print(pairs(rows))


def _rank_names(ranks: Sequence[int]) -> str:
    """ "rank 0", "ranks 0, 1", "ranks 0-7": an unbroken run of ranks is given by its ends."""
    distinct = sorted(set(ranks))
    if len(distinct) == 1:
        return f"rank {distinct[0]}"
    unbroken = len(distinct) > 2 and distinct[-1] - distinct[0] == len(distinct) - 1
    return f"ranks {distinct[0]}-{distinct[-1]}" if unbroken else f"ranks {', '.join(map(str, distinct))}"


def _device(name: str) -> Text:
    """One line for the table; the start panel has the whole name."""
    text = literal(name)
    text.truncate(DEVICE_SHOWN, overflow="ellipsis")
    return text


def _planned_graphs(compiled: Sequence[CompileRecord]) -> Column:
    """The graphs compiled in warm-up; "2 of 3" where the plan asked for more (or fewer)."""
    counts = [c.planned_graphs for c in compiled]
    cells = [
        Text(whole(c.planned_graphs))
        if c.planned_graphs == c.expected_graphs
        else Text(f"{c.planned_graphs} of {c.expected_graphs}", EVENT)
        for c in compiled
    ]
    return _words("planned\ngraphs", cells, (whole(min(counts)), whole(max(counts))) if len(counts) > 1 else ())


def _counts(header: str, values: Sequence[float], *, priority: int = 0, event: bool = False) -> Column:
    cells = [Text(whole(v), EVENT if event and v else "") for v in _with_extremes(values)]
    return Column(header, cells, priority)


def _seconds(header: str, values: Sequence[float], *, priority: int) -> Column:
    return Column(header, [Text(f"{v:,.1f}") for v in _with_extremes(values)], priority)


def _words(
    header: str, cells: Sequence[Text], extremes: Sequence[str], *, priority: int = 0, numeric: bool = True
) -> Column:
    return Column(header, [*cells, *(Text(e) for e in extremes)], priority, numeric)


def _with_extremes(values: Sequence[float]) -> list[float]:
    """The values, and for several ranks their min and max: the rows under the table."""
    return [*values, min(values), max(values)] if len(values) > 1 else list(values)
