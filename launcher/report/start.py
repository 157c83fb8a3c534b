"""The start panel: what is about to run, before anything slow begins."""

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from launcher.records.run import StartRecord
from launcher.report.figures import counted, extent, literal, whole
from launcher.report.layout import page_width, pairs


def start_panel(console: Console, start: StartRecord) -> None:
    """Print the recipe, the model, the device, the shapes and the data of the run that begins."""
    rows = [(Text(label, "cyan"), literal(value)) for label, value in _facts(start)]
    rows += [(Text("note", "yellow"), literal(note)) for note in start.notes]
    title = Text.assemble("recipe ", literal(start.recipe, "bold"))
    panel = Panel(pairs(rows, indent=0), title=title, title_align="left", border_style="dim cyan", box=box.ROUNDED)
    console.print(panel, width=page_width(console))


def _facts(start: StartRecord) -> list[tuple[str, str]]:
    share = start.trainable / start.parameters if start.parameters else 0.0
    return [
        ("model", f"{start.model} ({start.family})"),
        ("parameters", f"{whole(start.trainable)} trainable of {whole(start.parameters)} ({share * 100:.2f} %)"),
        ("device", f"{start.device} × {start.world_size}"),
        ("dtype", f"{start.dtype} · {start.quantization}"),
        ("attention", start.attention),
        ("compile", start.compile),
        ("CUDA graphs", start.cuda_graphs),
        ("activations", _activations(start)),
        ("optimizer", start.optimizer),
        ("shapes", _shapes(start)),
        ("step", _step(start)),
        ("data", _data(start)),
        ("loss on", _loss(start)),
        ("validation", counted(start.validation_rows, "row")),
        ("run folder", start.run_dir),
    ]


def _activations(start: StartRecord) -> str:
    forecast = "" if start.forecast_mib is None else f" · peak forecast {whole(start.forecast_mib)} MiB"
    return start.activations + forecast


def _shapes(start: StartRecord) -> str:
    widths = ", ".join(whole(width) for width in start.widths)
    shape = f"B × S = {whole(start.micro_batch)} × {widths if len(start.widths) == 1 else f'({widths})'}"
    return f"{shape} · accumulation {start.accumulation} · {counted(start.world_size, 'rank')}"


def _step(start: StartRecord) -> str:
    """Positions of one optimizer step over accumulation and ranks, and the number of steps."""
    rows = start.micro_batch * start.accumulation * start.world_size
    most = "" if len(start.widths) == 1 else "at most "
    return f"{most}{whole(rows * start.widths[-1])} tokens, all ranks · {counted(start.steps, 'step')}"


def _data(start: StartRecord) -> str:
    blocks = f"{counted(start.train_blocks, 'block')}, {start.fill * 100:.1f} % filled"
    if start.streamed:
        return f"streamed, {start.batching}: {blocks}, in the first window"
    epochs = "" if start.epochs is None else f" · {start.epochs:.2f} epochs"
    return f"{counted(start.train_rows, 'row')}, {start.batching}: {blocks}{epochs}"


def _loss(start: StartRecord) -> str:
    chosen = ", ".join(f"{name} in {counted(rows, 'row')}" for name, rows in start.loss_on.items())
    return f"{chosen} · {_computed(start)}template: {start.template}"


def _computed(start: StartRecord) -> str:
    """How much of the loss's work is left where some tokens can have no target."""
    tokens = [start.micro_batch * width for width in start.widths]
    if not start.loss_tokens or list(start.loss_tokens) == tokens:
        return ""
    if len(tokens) == 1:
        return f"computed for at most {whole(start.loss_tokens[0])} of {whole(tokens[0])} tokens · "
    shares = [round(100 * some / n) for some, n in zip(start.loss_tokens, tokens, strict=True)]
    return f"computed for at most {extent(shares)} % of the tokens · "
