"""What happens now: the phase before training, then step by step. A live line on a terminal, else plain lines.

On a terminal one line is redrawn and what ends (a phase, an evaluation) stays above it. Elsewhere every line carries
the seconds since the start, steps are printed at a cadence, and evaluations and skipped steps always.
"""

import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from launcher.records.run import EvalRecord, StepRecord
from launcher.report.figures import duration, learning_rate, literal, loss, norm, on_cpu, rate, whole
from launcher.report.layout import page_width

LINES = 20  # steps printed in all where there is no terminal
RECENT = 20  # steps whose mean time gives the ETA
LEAST_BAR, MOST_BAR = 8, 32  # characters of the bar
GIVE_WAY = ("grad norm", "lr", "tok/s", "memory")  # in this order, where a line is too short


class Progress:
    """Context manager around a run of `total_steps` optimizer steps. `device` names the memory figure: VRAM or RSS."""

    def __init__(self, console: Console, total_steps: int, *, device: str = "") -> None:
        self._console = console
        self._total = total_steps
        self._memory = "memory" if not device else "RSS" if on_cpu(device) else "VRAM"
        self._began = time.monotonic()
        self._phase: tuple[str, float] | None = None  # its name and when it began
        self._last: StepRecord | None = None
        self._recent: deque[float] = deque(maxlen=RECENT)  # seconds per step
        self._printed, self._next_line = 0, 0  # step of the last plain line, and the first at which one is due again
        self._spinner = Spinner("line" if console.options.ascii_only else "dots", style="cyan")
        live = Live(console=console, get_renderable=self._render, transient=True)
        self._live = live if console.is_interactive else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._settle(failed=kind is not None)
        if self._live:
            self._live.stop()

    def phase(self, name: str) -> None:
        """Say what begins: loading, compiling, saving. It lasts until the next phase or the next step."""
        self._settle()
        self._phase = (name, time.monotonic())
        if self._live:
            self._live.refresh()  # what begins may hold the interpreter for long: show its name first
        else:
            self._print(literal(name))

    def step(self, record: StepRecord) -> None:
        """Show an optimizer step. Steps come in order; under train.log_every > 1 not each of them comes."""
        if self._phase:
            self._settle()
        self._last = record
        self._recent.append(record.step_s)
        if record.skipped:
            self._print(Text(f"step {record.step:,} skipped: fp16 overflow, the loss scale is halved", "yellow"))
        if not self._live and (record.step >= self._next_line or record.step == self._total):
            self._print_step(record)

    def evaluation(self, record: EvalRecord) -> None:
        """Show an eval loss; it stays on the screen."""
        if self._last and record.step == self._total:
            self._settle()  # nothing follows on the live line
        when = "before the first update" if record.step == 0 else f"after step {record.step:,}"
        self._print(Text.assemble((f"eval loss {loss(record.eval_loss)}", "bold"), f" {when}"))

    def _settle(self, *, failed: bool = False) -> None:
        """What was going on ends: leave it on the screen for good, the last step also where no line was due."""
        phase, last, self._phase, self._last = self._phase, self._last, None, None
        if phase and self._live:
            name, began = phase
            mark = Text("✗ ", "bold red") if failed else Text("✓ ", "green")
            self._print(Text.assemble(mark, literal(name), (f"  {time.monotonic() - began:,.1f} s", "dim")))
        elif last and self._live:
            self._console.print(self._step_line(last))
        elif last and last.step != self._printed:
            self._print_step(last)

    def _print_step(self, record: StepRecord) -> None:
        self._printed, self._next_line = record.step, record.step + -(-self._total // LINES)
        room = page_width(self._console) - cell_len(self._stamp()) - cell_len(self._position(record)) - 2
        self._print(Text("  ".join([self._position(record), *self._figures(record, room)])))

    def _print(self, text: Text) -> None:
        """A line that stays; where nothing is live it begins with the seconds since the start."""
        if not self._live:
            text = Text.assemble(self._stamp(), text)
        self._console.print(text, soft_wrap=True, highlight=False)

    def _render(self) -> RenderableType:
        """The live line; rich calls it from its own thread, so the state is read once."""
        phase, last = self._phase, self._last
        if phase:
            name, began = phase
            self._spinner.text = Text.assemble(literal(name), (f"  {duration(time.monotonic() - began)}", "dim"))
            return self._spinner
        return self._step_line(last) if last else Text()

    def _step_line(self, record: StepRecord) -> Table:
        """Position, bar and figures on one line."""
        position = self._position(record)
        room = page_width(self._console) - cell_len(position) - 2
        figures = "  ".join(self._figures(record, room - LEAST_BAR))
        width = min(max(room - cell_len(figures), 1), MOST_BAR)
        line = Table.grid(padding=(0, 1, 0, 0))
        bar = ProgressBar(total=self._total, completed=record.step, width=width)
        line.add_row(Text(position, "bold"), bar, Text(figures, no_wrap=True))
        return line

    def _stamp(self) -> str:
        return f"{time.monotonic() - self._began:8.1f} s  "

    def _position(self, record: StepRecord) -> str:
        total = f"{self._total:,}"
        return f"step {record.step:>{len(total)},}/{total}"

    def _figures(self, record: StepRecord, room: int) -> list[str]:
        """What is said of a step, as much as `room` characters hold with two blanks between."""
        remaining_s = (self._total - record.step) * sum(self._recent) / len(self._recent)
        figures = {
            "loss": f"loss {loss(record.loss)}",
            "lr": f"lr {learning_rate(record.lr)}",
            "grad norm": f"grad norm {norm(record.grad_norm)}",
            "tok/s": f"{rate(record.tokens, record.step_s)} tok/s",
            "memory": f"{self._memory} {whole(record.vram_mib)} MiB",
            "eta": f"eta {duration(remaining_s)}",
        }
        for name in GIVE_WAY:
            if cell_len("  ".join(figures.values())) <= room:
                break
            del figures[name]
        return list(figures.values())
