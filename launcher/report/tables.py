"""Memory by phase, elapsed time by phase, and the losses."""

from collections.abc import Sequence
from typing import TypeVar

from rich.console import Console
from rich.text import Text

from launcher.records.run import EvalRecord, RankRecord, StepRecord
from launcher.report import figures
from launcher.report.figures import literal, on_cpu, whole
from launcher.report.layout import EVENT, Column, heading, indented, print_table

T = TypeVar("T")

STEPS_SHOWN = 12  # rows of the loss table that are steps; longer runs are sampled, first and last step included
EVALS_SHOWN = 6
BAR_WIDTH = 24  # characters of the longest bar of the elapsed table


def print_memory(console: Console, ranks: Sequence[RankRecord], *, forecast_mib: float | None = None) -> None:
    """Memory at the end of each phase, of the rank with the highest peak: the one that runs out first; and how near the
    forecast was that the activation policy was chosen by."""
    rank = max(ranks, key=lambda r: r.vram_peak_mib)
    if not rank.vram:
        return
    cpu = on_cpu(rank.device)
    whose = f"rank {rank.rank}" + (f", the highest peak of {len(ranks)} ranks" if len(ranks) > 1 else "")
    heading(console, "Resident memory by phase" if cpu else "VRAM by phase", whose)

    def mib(header: str, values: Sequence[float]) -> Column:
        return Column(f"{header}\nMiB", [Text(whole(v)) for v in values])

    phases = Column("phase", [literal(v.phase) for v in rank.vram], numeric=False)
    peak = mib("peak", [v.peak_mib for v in rank.vram])
    total = mib("machine total" if cpu else "device total", [v.total_mib for v in rank.vram])
    if cpu:  # allocated and reserved are the same figure there
        print_table(console, [phases, mib("resident", [v.allocated_mib for v in rank.vram]), peak, total])
        return
    allocated = mib("allocated", [v.allocated_mib for v in rank.vram])
    print_table(console, [phases, allocated, mib("reserved", [v.reserved_mib for v in rank.vram]), peak, total])
    if forecast_mib is not None:
        off = (rank.vram_peak_mib - forecast_mib) / forecast_mib
        said = f"peak forecast {whole(forecast_mib)} MiB, measured {whole(rank.vram_peak_mib)} MiB ({off:+.1%})"
        indented(console, Text(said.replace("%", " %")))


def print_elapsed(console: Console, elapsed_s: dict[str, float]) -> None:
    """Seconds of each phase in their order, their share and their sum."""
    if not elapsed_s:
        return
    total, longest = sum(elapsed_s.values()), max(elapsed_s.values())
    heading(console, "Elapsed by phase")
    seconds = list(elapsed_s.values())
    bars = ["━" * round(BAR_WIDTH * s / longest) if longest > 0 else "" for s in seconds]
    shares = [f"{100 * s / total:.0f} %" if total > 0 else "-" for s in seconds]
    columns = [
        Column("phase", [*map(literal, elapsed_s), Text("total")], numeric=False),
        Column("s", [Text(f"{s:,.1f}") for s in (*seconds, total)]),
        Column("share", [*map(Text, shares), Text("")]),
        Column("", [*(Text(bar, "blue") for bar in bars), Text("")], priority=1, numeric=False),
    ]
    print_table(console, columns, footer_rows=1)


def print_losses(console: Console, steps: Sequence[StepRecord], evals: Sequence[EvalRecord]) -> None:
    """A row for each step (a sample of a long run), with the eval loss measured after it."""
    if not steps and not evals:
        return
    shown_steps, shown_evals = sampled(steps, STEPS_SHOWN), sampled(evals, EVALS_SHOWN)
    left_out = len(shown_steps) < len(steps) or len(shown_evals) < len(evals)
    note = f"{len(shown_steps)} of {figures.counted(len(steps), 'step')}; all are in metrics.jsonl" if left_out else ""
    heading(console, "Loss", note)
    print_table(console, loss_columns(shown_steps, shown_evals))
    changes = [("loss", [s.loss for s in steps]), ("eval loss", [e.eval_loss for e in evals])]
    texts = [f"{name} {figures.change(values[0], values[-1])}" for name, values in changes if len(values) > 1]
    if texts:
        indented(console, Text(" · ".join(texts)))
    skipped = [s.step for s in steps if s.skipped]
    if skipped:
        names = ", ".join(f"{n:,}" for n in skipped[:STEPS_SHOWN]) + (", …" if len(skipped) > STEPS_SHOWN else "")
        count = figures.counted(len(skipped), "step")
        indented(console, Text(f"{count} skipped by the fp16 loss scaler (overflow): {names}", "yellow"))


def loss_columns(steps: Sequence[StepRecord], evals: Sequence[EvalRecord]) -> list[Column]:
    by_step = {s.step: s for s in steps}
    eval_losses = {e.step: e.eval_loss for e in evals}
    rows = sorted({*by_step, *eval_losses})

    def of_step(header: str, values: dict[int, str], priority: int = 0) -> Column:
        return Column(header, [_figure(values.get(n, "")) for n in rows], priority)

    return [
        Column("step", [Text(f"{n:,}") for n in rows]),
        of_step("loss", {s.step: figures.loss(s.loss) for s in steps}),
        of_step("lr", {s.step: figures.learning_rate(s.lr) for s in steps}),
        of_step("grad norm", {s.step: figures.norm(s.grad_norm) for s in steps}, priority=1),
        of_step("tok/s", {s.step: figures.rate(s.tokens, s.step_s) for s in steps}),
        of_step("step ms", {s.step: f"{s.step_s * 1000:,.1f}" for s in steps}, priority=2),
        of_step("eval loss", {n: figures.loss(value) for n, value in eval_losses.items()}),
    ]


def sampled(items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` items, evenly spaced, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    last = len(items) - 1
    return [items[round(i * last / (limit - 1))] for i in range(limit)]


def _figure(text: str) -> Text:
    return Text(text, EVENT if text in ("nan", "inf", "-inf") else "")
