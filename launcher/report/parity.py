"""mode=parity on the console: what was compared, by batch and by adapter, and whether the gate is open."""

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from launcher.records.parity import AdapterParity, Gate, Pair, ParityBatch, ParityRecord
from launcher.report.figures import counted, literal, loss, whole
from launcher.report.layout import EVENT, Column, heading, indented, page_width, pairs, print_table
from launcher.report.run_summary import print_verdicts
from launcher.report.tables import print_elapsed, sampled

BATCHES_SHOWN = 16  # rows of the table; more batches are sampled, first and last included
SAME = "the same batches, adapters and seeds; the weights are not updated between batches"


def parity_page(console: Console, record: ParityRecord) -> None:
    """Print the whole comparison. The verdicts stand last: where the eye is when it ends."""
    _print_head(console, record)
    print_elapsed(console, record.elapsed_s)
    _print_batches(console, record)
    _print_adapters(console, record)
    _print_means(console, record)
    if record.notes:
        heading(console, "Notes")
        for note in record.notes:
            indented(console, literal(note, "yellow"))
    print_verdicts(console, record.verdicts)


def _print_head(console: Console, record: ParityRecord) -> None:
    start, compiled = record.start, record.compile
    widths = ", ".join(whole(width) for width in start.widths)
    graphs = f"{counted(compiled.planned_graphs, 'graph')} of {compiled.expected_graphs} planned"
    facts = [
        ("model", f"{start.model} ({start.family})"),
        ("parameters", f"{whole(start.trainable)} trainable of {whole(start.parameters)}"),
        ("device", start.device),
        ("dtype", f"{start.dtype} · {start.quantization}"),
        ("compiled", f"{start.compile} · attention {start.attention} · {graphs} · CUDA graphs {start.cuda_graphs}"),
        ("eager", f"stock transformers, PEFT and bitsandbytes{_autocast(start.dtype)}"),
        ("reference", "the same stock modules in float32, on the dequantised base"),
        ("batches", f"{len(record.batches)} of {start.micro_batch} × {widths} × accumulation {start.accumulation}"),
        ("alike", SAME),
    ]
    rows = [(Text(label, "cyan"), literal(value)) for label, value in facts]
    rows += [(Text("note", "yellow"), literal(note)) for note in start.notes]
    title = Text.assemble("parity of recipe ", literal(start.recipe, "bold"))
    panel = Panel(pairs(rows, indent=0), title=title, title_align="left", border_style="dim cyan", box=box.ROUNDED)
    console.print(panel, width=page_width(console))


def _autocast(dtype: str) -> str:
    return "" if dtype == "float32" else f", autocast to {dtype}"


def _print_batches(console: Console, record: ParityRecord) -> None:
    shown, gate = sampled(record.batches, BATCHES_SHOWN), record.gate
    left_out = f", {len(shown)} of {len(record.batches)} batches" if len(shown) < len(record.batches) else ""
    heading(console, "Batches", f"mean loss of a token; errors are against fp32{left_out}")

    def column(header: str, cell: Callable[[ParityBatch], Text | str], priority: int = 0) -> Column:
        return Column(header, [Text.assemble(cell(batch)) for batch in shown], priority)

    columns = [
        column("batch", lambda b: f"{b.batch:,}"),
        column("supervised\ntokens", lambda b: whole(b.supervised_tokens), 3),
        column("compiled\nloss", lambda b: loss(b.loss.compiled)),
        column("eager\nloss", lambda b: loss(b.loss.eager)),
        column("fp32\nloss", lambda b: loss(b.reference_loss)),
        column("compiled\nto eager", lambda b: _flagged(b.loss_difference, b.loss_difference <= gate.loss)),
        column("least\ncosine", lambda b: _cosine(b.least_cosine, gate), 1),
        column("loss error\ncompiled", lambda b: f"{b.loss_error.compiled:.1e}", 2),
        column("\neager", lambda b: f"{b.loss_error.eager:.1e}", 2),
        column("gradient error\ncompiled", lambda b: f"{b.gradient_error.compiled:.1e}", 1),
        column("\neager", lambda b: f"{b.gradient_error.eager:.1e}", 1),
    ]
    print_table(console, columns)


def _print_adapters(console: Console, record: ParityRecord) -> None:
    heading(console, "Adapter gradients", "the worst of each kind, over its layers and all batches")
    found, gate = record.adapters, record.gate

    def column(header: str, cell: Callable[[AdapterParity], Text | str], priority: int = 0) -> Column:
        return Column(header, [Text.assemble(cell(adapter)) for adapter in found], priority)

    columns = [
        Column("adapter", [literal(f"{a.kind} {a.matrix}") for a in found], numeric=False),
        column("modules", lambda a: whole(a.modules), 2),
        column("cosine\ncompiled, eager", lambda a: _cosine(a.least_cosine, gate)),
        Column("where", [Text(a.where, "dim") for a in found], 1, numeric=False),
        column("norm difference\ncompiled, eager", lambda a: f"{a.norm_difference:.1e}"),
        column("cosine\neager, fp32", lambda a: f"{a.eager_cosine:.5f}", 1),
    ]
    print_table(console, columns)


def _print_means(console: Console, record: ParityRecord) -> None:
    heading(console, "Error against fp32", "means over the batches")
    errors = [("loss", record.loss_error), ("gradient, all adapters", record.gradient_error)]
    columns = [
        Column("of the", [Text(name) for name, _ in errors], numeric=False),
        Column("compiled", [Text(f"{error.compiled:.2e}") for _, error in errors]),
        Column("eager", [Text(f"{error.eager:.2e}") for _, error in errors]),
        Column("ratio", [Text(_ratio(error)) for _, error in errors]),
    ]
    print_table(console, columns)


def _ratio(error: Pair) -> str:
    return f"{error.compiled / error.eager:.2f}" if error.eager else "-"


def _flagged(value: float, holds: bool) -> Text:
    return Text(f"{value:.1e}", "" if holds else EVENT)


def _cosine(value: float, gate: Gate) -> Text:
    return Text(f"{value:.5f}", "" if value >= gate.cosine else EVENT)
