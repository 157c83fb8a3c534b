"""The console as a sink of events: phases, then step by step, and a page for each record that has one.

On a terminal one line is redrawn, and phases that ended, evaluations and skipped steps stay above it. Elsewhere every
line carries the seconds since the start, steps are printed at a cadence, and evaluations and skipped steps always.
"""

import time
from collections import deque
from datetime import timedelta
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from launcher.records.run import EvalRecord, StartRecord, StepRecord
from launcher.report.console import literal, page_width
from launcher.report.pages import page_of
from launcher.report.pages.formatting import loss, norm, on_cpu, rate, whole
from launcher.report.render import print_page

LINES = 20  # steps printed in all where there is no terminal
RECENT = 20  # steps whose mean time gives the ETA
LEAST_BAR, MOST_BAR = 12, 32  # characters of the bar; the least is as long as the stamp of a plain line
GIVE_WAY = ("grad norm", "lr", "tok/s", "memory")  # left out in this order where a line is too short


class Screen:
    """Context manager around one run, whose events come to `show`. Steps follow the StartRecord."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._total, self._memory = 1, "VRAM"  # steps, and what the memory figure is called
        self._phase: tuple[str, float] | None = None  # its name and when it began
        self._last: StepRecord | None = None  # shown on the live line, or not printed yet
        self._next_line = 0  # the step at which a plain line is due again
        self._recent: deque[float] = deque(maxlen=RECENT)  # seconds per step
        self._spinner = Spinner("line" if console.options.ascii_only else "dots", style="cyan")
        live = Live(console=console, get_renderable=self._render, transient=True)
        self._live = live if console.is_interactive else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._settle(failed=kind is not None)
        if self._live:
            self._live.stop()

    def show(self, event: object) -> None:
        """Show a record, or a phase by its name. An event that has no place on a console is ignored."""
        match event:
            case str():
                self._show_phase(event)
            case StepRecord():
                self._show_step(event)
            case EvalRecord():
                self._show_evaluation(event)
            case _ if page := page_of(event):
                self._settle()
                print_page(self._console, page)
        if isinstance(event, StartRecord):
            self._total, self._memory = event.steps, "RSS" if on_cpu(event.device) else "VRAM"
            self._began = time.monotonic()

    def _show_phase(self, name: str) -> None:
        self._settle()
        self._phase = (name, time.monotonic())
        if self._live:
            self._live.refresh()  # the phase may hold the interpreter for long: show its name first
        else:
            self._print(literal(name))

    def _show_step(self, record: StepRecord) -> None:
        """Steps come in order, but not every one where train.log_every > 1."""
        if self._phase:
            self._settle()
        self._last = record
        self._recent.append(record.step_s)
        if record.skipped:
            self._print(Text(f"step {record.step:,} skipped: fp16 overflow, the loss scale is halved", "yellow"))
        if not self._live and (record.step >= self._next_line or record.step == self._total):
            self._next_line = record.step + -(-self._total // LINES)
            self._settle()

    def _show_evaluation(self, record: EvalRecord) -> None:
        if self._last and record.step == self._total:
            self._settle()  # no step follows on the live line
        when = "before the first update" if record.step == 0 else f"after step {record.step:,}"
        self._print(Text.assemble((f"eval loss {loss(record.eval_loss)}", "bold"), f" {when}"))

    def _settle(self, *, failed: bool = False) -> None:
        """End what is going on, and leave it on the screen: a phase, or the last step even where no line was due."""
        phase, last, self._phase, self._last = self._phase, self._last, None, None
        if phase and self._live:
            name, began = phase
            mark = Text("✗ ", "bold red") if failed else Text("✓ ", "green")
            self._print(Text.assemble(mark, literal(name), (f"  {time.monotonic() - began:,.1f} s", "dim")))
        elif last:
            self._print(self._step_line(last))

    def _print(self, text: Text) -> None:
        """A line that stays; where nothing is live it begins with the seconds since the start."""
        stamp = "" if self._live else f"{time.monotonic() - self._began:8.1f} s  "
        self._console.print(Text.assemble(stamp, text), soft_wrap=True, highlight=False)

    def _render(self) -> RenderableType:
        """The live line; rich calls this from its own thread, so the state is read once."""
        phase, last = self._phase, self._last
        if phase:
            name, began = phase
            elapsed = timedelta(seconds=round(time.monotonic() - began))
            self._spinner.text = Text.assemble(literal(name), (f"  {elapsed}", "dim"))
            return self._spinner
        return self._step_line(last) if last else Text()

    def _step_line(self, record: StepRecord) -> Text:
        """Position, bar (where the line is live) and as many figures as there is room for."""
        total = f"{self._total:,}"
        position = f"step {record.step:>{len(total)},}/{total}"
        remaining_s = (self._total - record.step) * sum(self._recent) / len(self._recent)
        figures = {
            "loss": f"loss {loss(record.loss)}",
            "lr": f"lr {record.lr:.2e}",
            "grad norm": f"grad norm {norm(record.grad_norm)}",
            "tok/s": f"{rate(record.tokens, record.step_s)} tok/s",
            "memory": f"{self._memory} {whole(record.vram_mib)} MiB",
            "eta": f"eta {timedelta(seconds=round(remaining_s))}",
        }
        room = page_width(self._console) - len(position) - 2
        for name in GIVE_WAY:
            if len("  ".join(figures.values())) > room - LEAST_BAR:
                del figures[name]
        text = "  ".join(figures.values())
        if not self._live:
            return Text(f"{position}  {text}")
        width = min(max(room - len(text), 1), MOST_BAR)
        bar = "━" * round(width * record.step / self._total)
        return Text.assemble((position, "bold"), " ", (f"{bar:{width}}", "bar.complete"), " ", text)
