"""The start panel: what is about to run, before anything slow begins."""

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from launcher.records import StartRecord
from launcher.report.figures import counted, literal, whole
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
        ("optimizer", start.optimizer),
        ("shapes", _shapes(start)),
        ("step", _step(start)),
        ("data", _data(start)),
        ("validation", counted(start.validation_rows, "row")),
        ("run folder", start.run_dir),
    ]


def _shapes(start: StartRecord) -> str:
    shape = f"B × S = {whole(start.micro_batch)} × {whole(start.max_length)}"
    return f"{shape} · accumulation {start.accumulation} · {counted(start.world_size, 'rank')}"


def _step(start: StartRecord) -> str:
    """Positions of one optimizer step over accumulation and ranks, and the number of steps."""
    positions = start.micro_batch * start.max_length * start.accumulation * start.world_size
    return f"{whole(positions)} tokens, all ranks · {counted(start.steps, 'step')}"


def _data(start: StartRecord) -> str:
    blocks = f"{counted(start.train_rows, 'row')} in {counted(start.train_blocks, 'block')}"
    seen = start.steps * start.micro_batch * start.accumulation * start.world_size
    epochs = f" · {seen / start.train_blocks:.2f} epochs" if start.train_blocks else ""
    return f"{blocks}, {start.fill * 100:.1f} % filled{epochs}"
