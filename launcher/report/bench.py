"""mode=bench on the console: naive and ours side by side, then what the difference comes to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from launcher.records.bench import WARM_UP_STEPS, BenchRecord, SideRecord, difference, ratio
from launcher.report.figures import counted, extent, literal, loss, on_cpu, whole
from launcher.report.layout import EVENT, Column, heading, indented, page_width, pairs, print_table
from launcher.report.run_summary import print_verdicts
from launcher.report.tables import sampled

LOSSES_SHOWN = 8  # rows of the table; of more steps a sample, first and last included
NAIVE = "stock transformers, PEFT and bitsandbytes, gradient checkpointing"
NOTHING = "-"


@dataclass(frozen=True)
class Row:
    """One figure of both sides."""

    label: str
    figure: Callable[[SideRecord], float | None]
    shown: Callable[[float], str] = whole


def bench_page(console: Console, record: BenchRecord) -> None:
    """Print the whole comparison. What it comes to stands last: where the eye is when it ends."""
    _print_head(console, record)
    _print_rows(console, ("Start", "seconds from the start of the process"), _start_rows(record), record)
    memory = "resident, on a CPU" if on_cpu(record.ours.start.device) else "VRAM"
    _print_rows(console, ("Memory", f"MiB, {memory}"), _memory_rows(), record)
    _print_losses(console, record)
    measured = counted(len(record.ours.side.steps_s), "step")
    note = f"{measured}, each timed alone, behind {1 + WARM_UP_STEPS} that are not counted"
    _print_rows(console, ("Steps", note), _step_rows(record), record)
    if record.notes:
        heading(console, "Notes")
        for found in record.notes:
            indented(console, literal(found, "yellow"))
    print_verdicts(console, record.verdicts)
    _print_outcome(console, record)


def _print_head(console: Console, record: BenchRecord) -> None:
    start, compiled, ceiling = record.ours.start, record.ours.compile, record.ours.ceiling
    widths = ", ".join(whole(width) for width in start.widths)
    graphs = f"{counted(compiled.planned_graphs, 'graph')} of {compiled.expected_graphs} planned"
    counts = f"{counted(compiled.graph_breaks, 'graph break')}, {counted(compiled.recompiles, 'recompile')}"
    cached = f"{counted(compiled.cache_hits, 'hit')} of the compile cache"
    rows = "random rows" if record.rows == "random" else "the recipe's data"
    product = f"{_flops(ceiling.flops_per_s)}: the fastest {ceiling.dtype} product of {ceiling.size:,}²"
    autocast = "" if start.dtype == "float32" else f", autocast to {start.dtype}"
    facts = [
        ("model", f"{start.model} ({start.family})"),
        ("parameters", f"{whole(start.trainable)} trainable of {whole(start.parameters)}"),
        ("device", start.device),
        ("dtype", f"{start.dtype} · {start.quantization}"),
        ("ours", f"{start.compile} · attention {start.attention} · {graphs}, {counts}, {cached}"),
        ("CUDA graphs", start.cuda_graphs),
        ("activations", start.activations),
        *([("naive", NAIVE + autocast)] if record.naive else []),
        ("alike", f"seed, adapters, batches, optimizer ({start.optimizer})"),
        ("a step", f"{start.micro_batch} × {widths} × accumulation {start.accumulation} of {rows}"),
        (
            "its tokens",
            f"{extent(record.workload.tokens)}, of them {extent(record.workload.supervised_tokens)} targets",
        ),
        ("ceiling", product),
    ]
    lines = [(Text(label, "cyan"), literal(value)) for label, value in facts]
    lines += [(Text("note", "yellow"), literal(note)) for note in start.notes]
    title = Text.assemble("bench of recipe ", literal(start.recipe, "bold"))
    panel = Panel(pairs(lines, indent=0), title=title, title_align="left", border_style="dim cyan", box=box.ROUNDED)
    console.print(panel, width=page_width(console))


def _flops(per_s: float) -> str:
    return f"{per_s / 1e12:,.0f} TFLOP/s" if per_s >= 1e13 else f"{per_s / 1e9:,.1f} GFLOP/s"


def _start_rows(record: BenchRecord) -> list[Row]:
    sides = [side for side in (record.naive, record.ours.side) if side]
    names = list(dict.fromkeys(name for side in reversed(sides) for name in side.phases_s))

    def phase(name: str) -> Row:
        return Row(name, lambda side: side.phases_s.get(name), "{:,.1f}".format)

    return [*map(phase, names), Row("to the end of the first step", lambda side: side.first_step_s, "{:,.1f}".format)]


def _memory_rows() -> list[Row]:
    return [
        Row("before the first step", lambda side: side.before_mib),
        Row("peak allocated", lambda side: side.peak_allocated_mib),
        Row("peak reserved", lambda side: side.peak_reserved_mib),
    ]


def _step_rows(record: BenchRecord) -> list[Row]:
    def spread(name: str) -> Callable[[SideRecord], float | None]:
        return lambda side: getattr(side.step_ms, name) if side.step_ms else None

    return [
        Row("step ms, median", spread("median"), "{:,.1f}".format),
        Row("20th percentile", spread("p20"), "{:,.1f}".format),
        Row("80th percentile", spread("p80"), "{:,.1f}".format),
        Row("tokens/s", record.tokens_per_s),
        Row("of the matmul ceiling", record.ceiling_share, lambda share: f"{100 * share:.1f} %"),
    ]


def _print_rows(console: Console, title: tuple[str, str], rows: Sequence[Row], record: BenchRecord) -> None:
    heading(console, *title)
    naive, ours = record.naive, record.ours.side

    def cells(side: SideRecord, style: str = "") -> list[Text]:
        values = [(row, row.figure(side)) for row in rows]
        return [Text(NOTHING if value is None else row.shown(value), style) for row, value in values]

    columns = [Column("", [Text(row.label) for row in rows], numeric=False)]
    if naive:
        columns.append(Column("naive", cells(naive)))
    columns.append(Column("ours", cells(ours, "bold")))
    if naive:
        ratios = [ratio(row.figure(ours), row.figure(naive)) for row in rows]
        columns.append(Column("ours to naive", [Text(NOTHING if r is None else f"{r:,.2f} ×") for r in ratios]))
    print_table(console, columns)


def _print_losses(console: Console, record: BenchRecord) -> None:
    ours, naive = record.ours.side.losses, record.naive.losses if record.naive else ()
    shown = sampled(range(len(ours)), LOSSES_SHOWN)
    left_out = f", {len(shown)} of {counted(len(ours), 'step')}" if len(shown) < len(ours) else ""
    heading(console, "Loss", f"mean of a supervised token{left_out}")
    columns = [Column("step", [Text(f"{n + 1:,}") for n in shown])]
    if naive:
        columns.append(Column("naive", [Text(loss(naive[n]) if n < len(naive) else NOTHING) for n in shown]))
    columns.append(Column("ours", [Text(loss(ours[n])) for n in shown]))
    if naive:
        columns.append(Column("apart", [_apart(record, n) if n < len(naive) else Text(NOTHING) for n in shown]))
    print_table(console, columns)


def _apart(record: BenchRecord, step: int) -> Text:
    """Judged at the first step only: behind it each side has weights of its own."""
    assert record.naive is not None
    apart = difference(record.ours.side.losses[step], record.naive.losses[step])
    return Text(f"{apart:.1e}", EVENT if step == 0 and not apart <= record.ours.loss_tolerance else "")


def _print_outcome(console: Console, record: BenchRecord) -> None:
    console.print()
    for line in _outcome(record):
        indented(console, Text(line, "bold"))


def _outcome(record: BenchRecord) -> list[str]:
    ours, naive = record.ours.side, record.naive
    tokens, peak = record.tokens_per_s(ours), ours.peak_allocated_mib
    assert tokens is not None and peak is not None, "our side has come to its end"
    own = f"ours {whole(tokens)} tokens/s, peak {whole(peak)} MiB"
    if naive is None:
        return [own]
    if naive.failure:
        return [own, "naive ran out of memory" if naive.out_of_memory else "naive failed"]
    assert record.speed_up is not None and record.memory_ratio is not None
    said = f"{own}: {record.speed_up:.2f} × the speed of naive, {record.memory_ratio:.2f} × its memory"
    return [said, _pay_back(record, naive)]


def _pay_back(record: BenchRecord, naive: SideRecord) -> str:
    ours, steps = record.ours.side, record.pay_back_steps
    assert ours.first_step_s is not None and naive.first_step_s is not None
    behind_s = ours.first_step_s - naive.first_step_s
    if steps is None:
        return "compile never pays back: our step is not faster"
    if steps == 0:
        return f"compile pays back after 0 steps: our first step ends {-behind_s:.1f} s sooner"
    return f"compile pays back after {counted(steps, 'step')}: our first step ends {behind_s:.1f} s later"
