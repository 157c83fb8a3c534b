"""A run in a cell of a notebook: one display that is redrawn in place, and the pages below it as plain text.

The kernel's shell is handed in; IPython is not imported. Where HTML is not shown, the display is its headline.
"""

import contextvars
import html
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Self
from uuid import uuid4

from rich.console import Console

from launcher.credentials import masked_record
from launcher.records.run import EvalRecord, Note, Phase, StartRecord, StepRecord
from launcher.report.console import literal
from launcher.report.pages import page_of
from launcher.report.pages.curves import downsampled
from launcher.report.pages.formatting import loss, norm, rate, whole
from launcher.report.render import print_page

UPDATE_S = 0.5  # between two drawings, at least
ROWS = 5  # steps in the table
ETA_STEPS = 20  # whose mean time gives the ETA
POINTS = 150  # of a curve
AVERAGED = 20  # steps of a point that are averaged, evenly spaced: a long run is drawn again and again
CURVE_WIDTH, CURVE_HEIGHT, CURVE_MARGIN = 600, 120, 6  # of the curves, in units of their own
COLORS = {"loss": "#4c8bf5", "eval loss": "#e8833a"}  # seen on light and dark
COLUMNS = ("step", "loss", "lr", "grad norm", "tok/s", "MiB", "")

Curve = list[tuple[int, float]]  # steps and values


class NotebookScreen:
    """Context manager around one run, whose events come to `show`, as of Screen. `clock`: seconds since it began."""

    def __init__(self, shell: Any, console: Console, *, clock: Callable[[], float]) -> None:
        self._publisher, self._console, self._clock = shell.display_pub, console, clock
        self._id, self._drawn_s, self.lost = uuid4().hex, -math.inf, False
        self._phase, self._began_s = Phase("starting", lambda: ""), clock()
        self._total = 0  # steps; known once training begins
        self._end = ""  # how the run ended
        self._steps: deque[StepRecord] = deque(maxlen=ETA_STEPS)
        self._curves: dict[str, Curve] = {name: [] for name in COLORS}
        self._lock, self._ended = threading.RLock(), threading.Event()
        # In the context of the cell: a kernel sends what a thread displays to the cell of its context.
        beat = contextvars.copy_context()
        self._heart = threading.Thread(target=lambda: beat.run(self._beat_until_end), daemon=True)

    def __enter__(self) -> Self:
        self._draw(update=False)
        self._heart.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, *, failed: bool = True) -> None:
        """Draw the last time."""
        with self._lock:
            if not self._ended.is_set():
                self._ended.set()
                elapsed = timedelta(seconds=round(self._clock()))
                self._end = f"ended during {self._phase.name}" if failed else f"done in {elapsed}"
                self._draw()

    def show(self, event: object) -> None:
        """Show a record, or a phase by its name. An event that has no place here is ignored."""
        with self._lock:
            self._take(event)
            if self._clock() - self._drawn_s >= UPDATE_S:
                self._draw()

    def headline(self) -> str:
        """What is going on, in one line."""
        parts = [self._end or self._phase.name]
        if self._steps:
            last = self._steps[-1]
            seconds = sum(step.step_s for step in self._steps) / len(self._steps)
            remaining = timedelta(seconds=round((self._total - last.step) * seconds))
            parts += [f"step {last.step:,}/{self._total:,}", f"loss {loss(last.loss)}"]
            parts += [f"eval loss {loss(self._curves['eval loss'][-1][1])}"] if self._curves["eval loss"] else []
            parts += [] if self._end or last.step == self._total else [f"eta {remaining}"]
        elif not self._end:
            parts += [str(timedelta(seconds=round(self._clock() - self._began_s))), self._phase.progress()]
        return " · ".join(filter(None, parts))

    def _take(self, event: object) -> None:
        match event:
            case str() | Phase():
                self._phase, self._began_s = (Phase(event, str) if isinstance(event, str) else event), self._clock()
            case StepRecord():
                self._steps.append(event)
                self._curves["loss"].append((event.step, event.loss))
            case EvalRecord():
                self._curves["eval loss"].append((event.step, event.eval_loss))
            case Note():
                self._console.print(literal(f"note: {event.text}"), soft_wrap=True, highlight=False)
            case _ if page := page_of(masked_record(event)):
                print_page(self._console, page)
        if isinstance(event, StartRecord):
            self._phase, self._total = Phase("training", str), event.steps

    def _beat_until_end(self) -> None:
        """A long phase tells its time and how far it has come."""
        while not self._ended.wait(2 * UPDATE_S):
            with self._lock:
                if not self._ended.is_set():
                    self._draw()

    def _draw(self, *, update: bool = True) -> None:
        """Once the display takes no more, the run goes on without it."""
        self._drawn_s = self._clock()
        self.lost = self.lost or bool(getattr(self._console.file, "lost", False))
        if self.lost:
            return
        text = literal(self.headline()).plain
        data = {"text/plain": text, "text/html": self._html(text)}
        try:
            self._publisher.publish(data, metadata={}, transient={"display_id": self._id}, update=update)
        except Exception:  # of sockets, or of who replaced the publisher; status.json says that it is lost
            self.lost = True

    def _html(self, headline: str) -> str:
        done = self._steps[-1].step if self._steps else 0
        bar = f'<progress value="{done}" max="{self._total}" style="width:100%"></progress>' if self._total else ""
        return (
            f'<div style="max-width:{CURVE_WIDTH}px;font-family:monospace"><div><b>{html.escape(headline)}</b></div>'
            f"{bar}{curves(self._curves)}{_table([*self._steps][-ROWS:])}</div>"
        )


def curves(named: dict[str, Curve]) -> str:
    """An SVG of the curves that have two finite points or more, with the bounds of both axes; "" if there is none."""
    drawn = {name: drawn_points(points) for name, points in named.items()}
    drawn = {name: points for name, points in drawn.items() if len(points) > 1}
    if not drawn:
        return ""
    xs, ys = zip(*(point for points in drawn.values() for point in points), strict=True)
    left, low, wide, tall = min(xs), min(ys), (max(xs) - min(xs)) or 1, (max(ys) - min(ys)) or 1

    def place(x: float, y: float) -> str:
        across = CURVE_MARGIN + (x - left) / wide * (CURVE_WIDTH - 2 * CURVE_MARGIN)
        return f"{across:.1f},{CURVE_HEIGHT - CURVE_MARGIN - (y - low) / tall * (CURVE_HEIGHT - 2 * CURVE_MARGIN):.1f}"

    lines = ""
    for name, points in drawn.items():
        path = " ".join(place(*point) for point in points)
        lines += f'<polyline fill="none" stroke="{COLORS[name]}" stroke-width="1.5" points="{path}"/>'
    legend = " ".join(f'<span style="color:{COLORS[name]}">{name}</span>' for name in drawn)
    bounds = f"{loss(low)} to {loss(max(ys))}, steps {left:,.0f} to {max(xs):,.0f}"
    box = f"0 0 {CURVE_WIDTH} {CURVE_HEIGHT}"
    return f'<svg viewBox="{box}" width="100%" role="img">{lines}</svg><div>{legend} {bounds}</div>'


def drawn_points(points: Curve) -> Curve:
    """At most POINTS points, each a mean; what is not finite is left out."""
    some = points[:: max(1, len(points) // (POINTS * AVERAGED))]
    return [(x, mean) for x, mean, *_ in downsampled(some, POINTS) if mean is not None]


def _table(steps: Sequence[StepRecord]) -> str:
    if not steps:
        return ""
    rows = [COLUMNS, *map(_cells, steps)]
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table style="color:inherit">{lines}</table>'


def _cells(step: StepRecord) -> tuple[str, ...]:
    mark = "skipped: fp16 overflow" if step.skipped else "spike" if step.spike else ""
    figures = f"{step.step:,}", loss(step.loss), f"{step.lr:.2e}", norm(step.grad_norm)
    return (*figures, rate(step.tokens, step.step_s), whole(step.vram_mib), mark)
