"""The console as a sink of events: phases, then step by step, and a page for each record that has one.

On a terminal one line is redrawn, and phases that ended, evaluations and skipped steps stay above it. Elsewhere every
line carries the seconds since the run began, steps are printed at a cadence, and evaluations and skipped steps always;
where nothing was printed for SILENCE_S, a line says what is going on.
"""

import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from launcher.credentials import masked_record
from launcher.records.run import EvalRecord, Note, Phase, StartRecord, StepRecord
from launcher.report.console import literal, page_width
from launcher.report.pages import page_of
from launcher.report.pages.formatting import loss, norm, on_cpu, rate, whole
from launcher.report.render import print_page

LINES = 20  # steps printed in all where there is no terminal
RECENT = 20  # steps whose mean time gives the ETA
LEAST_BAR, MOST_BAR = 12, 32  # characters of the bar; the least is as long as the stamp of a plain line
GIVE_WAY = ("memory", "grad norm", "tok/s", "lr")  # left out in this order where a line is too short
SILENCE_S = 30.0  # without a line, where there is no terminal
NEWS_S = 5.0  # the same, where the phase has made progress
BEAT_S = 1.0  # between two looks at the clock


class Screen:
    """Context manager around one run, whose events come to `show`. Steps follow the StartRecord.

    `clock` gives the seconds since the run began.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float]) -> None:
        self._console, self._clock = console, clock
        self._total, self._memory = 1, "VRAM"  # steps, and what the memory figure is called
        self._phase: tuple[Phase, float] | None = None  # and when it began
        self._last: StepRecord | None = None  # shown on the live line, or not printed yet
        self._step: int | None = None  # the last that ended, while steps are under way
        self._printed_s = self._event_s = clock()  # when the last line was printed, and the last event came
        self._news = ""  # progress of the phase that was printed last
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._next_line = 0  # the step at which a plain line is due again
        self._recent: deque[float] = deque(maxlen=RECENT)  # seconds per step
        self._spinner = Spinner("line" if console.options.ascii_only else "dots", style="cyan")
        live = Live(console=console, get_renderable=self._render, transient=True)
        self._live = live if console.is_interactive else None
        self._heart = threading.Thread(target=self._beat_until_end, daemon=True)

    @property
    def lost(self) -> bool:
        """Whether the console could not be written to any more."""
        return bool(getattr(self._console.file, "lost", False))

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        else:
            self._heart.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, *, failed: bool = True) -> None:
        """Print what was not shown yet, and give the terminal its cursor back."""
        self._ended.set()
        with self._lock:
            self._settle(failed=failed)
        if self._live:
            self._live.stop()

    def show(self, event: object) -> None:
        """Show a record, or a phase by its name. An event that has no place on a console is ignored."""
        with self._lock:
            self._show(event)
            self._event_s = self._clock()

    def beat(self) -> None:
        """Print what is going on if nothing was printed for long. A thread calls this where nothing is live."""
        with self._lock:
            now, (phase, began_s) = self._clock(), self._phase or (None, 0.0)
            news = phase.progress() if phase else ""
            if self._ended.is_set() or now - self._printed_s < (NEWS_S if news != self._news else SILENCE_S):
                return
            if phase:
                self._news = news
                self._print(literal(", ".join(filter(None, [f"{phase.name}: {now - began_s:.0f} s", news]))))
            elif self._last:
                self._settle()
            elif self._step is not None:
                last = f"step {self._step:,}/{self._total:,} ended" if self._step else "training began"
                self._print(Text(f"{last} {now - self._event_s:.0f} s ago"))

    def _beat_until_end(self) -> None:
        while not self._ended.wait(BEAT_S):
            self.beat()

    def _show(self, event: object) -> None:
        match event:
            case str():
                self._show_phase(Phase(event, lambda: ""))
            case Phase():
                self._show_phase(event)
            case StepRecord():
                self._show_step(event)
            case EvalRecord():
                self._show_evaluation(event)
            case Note():
                self._settle()
                self._print(literal(f"note: {event.text}", "yellow"))
            case _ if page := page_of(masked_record(event)):
                self._settle()
                print_page(self._console, page)
                self._printed_s, self._step = self._clock(), None
        if isinstance(event, StartRecord):
            self._total, self._memory, self._step = event.steps, "RSS" if on_cpu(event.device) else "VRAM", 0

    def _show_phase(self, phase: Phase) -> None:
        self._settle()
        self._step = None
        self._phase = (phase, self._clock())
        if self._live:
            self._live.refresh()  # the phase may hold the interpreter for long: show its name first
        else:
            self._print(literal(phase.name))

    def _show_step(self, record: StepRecord) -> None:
        """Steps come in order, but not every one where train.log_every > 1."""
        if self._phase:
            self._settle()
        self._last, self._step = record, record.step
        self._recent.append(record.step_s)
        if record.skipped:
            self._print(Text(f"step {record.step:,} skipped: fp16 overflow, the loss scale is halved", "yellow"))
        if record.spike:
            figures = f"loss {loss(record.loss)}, gradient norm {norm(record.grad_norm)}"
            self._print(Text(f"step {record.step:,} spiked, far above the usual: {figures}", "yellow"))
        silent = self._clock() - self._printed_s >= SILENCE_S
        if not self._live and (silent or record.step >= self._next_line or record.step == self._total):
            self._next_line = record.step + -(-self._total // LINES)
            self._settle()

    def _show_evaluation(self, record: EvalRecord) -> None:
        if self._last and record.step == self._total:
            self._settle()  # no step follows on the live line
        when = "before the first update" if record.step == 0 else f"after step {record.step:,}"
        self._print(Text.assemble((f"eval loss {loss(record.eval_loss)}", "bold"), f" {when}"))

    def _settle(self, *, failed: bool = False) -> None:
        """End what is going on, and leave it on the screen: a phase, or the last step even where no line was due."""
        phase, last, self._phase, self._last, self._news = self._phase, self._last, None, None, ""
        if phase and self._live:
            mark = Text("✗ ", "bold red") if failed else Text("✓ ", "green")
            self._print(Text.assemble(mark, literal(phase[0].name), (f"  {self._clock() - phase[1]:,.1f} s", "dim")))
        elif last:
            self._print(self._step_line(last))

    def _print(self, text: Text) -> None:
        """A line that stays; where nothing is live it begins with the seconds since the run began."""
        self._printed_s = self._clock()
        stamp = "" if self._live else f"{self._printed_s:8.1f} s  "
        self._console.print(Text.assemble(stamp, text), soft_wrap=True, highlight=False)

    def _render(self) -> RenderableType:
        """The live line; rich calls this from its own thread, so the state is read once."""
        running, last = self._phase, self._last
        if running:
            (phase, began_s), room = running, page_width(self._console)
            elapsed = timedelta(seconds=round(self._clock() - began_s))
            line = Text.assemble(literal(phase.name), (f"  {elapsed}  ", "dim"), literal(phase.progress()))
            line.truncate(room - len("⠋ "), overflow="ellipsis")
            self._spinner.text = line
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
