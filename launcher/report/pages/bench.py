"""mode=bench as a page: naive, plain and ours side by side, then what the difference comes to."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from launcher.records.bench import BenchRecord, SideRecord, SpeedComparison
from launcher.report.pages.formatting import counted, extent, loss, on_cpu, whole
from launcher.report.pages.page import Column, Page, Section, Styled, Table, Value, flagged
from launcher.report.pages.sections import model_facts, note_facts, notes, sample_note, sampled, verdicts

LOSSES_SHOWN = 8  # rows of the table; of more steps a sample, first and last included
NOTHING = "-"


class Figure(NamedTuple):
    """One figure of both sides, and how it reads."""

    label: str
    figure: Callable[[SideRecord], float | None]
    form: str = "{:,.0f}"

    def shown(self, side: SideRecord) -> str:
        value = self.figure(side)
        return NOTHING if value is None else self.form.format(value)

    def ratio(self, side: SideRecord, other: SideRecord) -> str:
        value, base = self.figure(side), self.figure(other)
        return f"{value / base:,.2f} ×" if value is not None and base else NOTHING


MEMORY = [
    Figure("before the first step", lambda side: side.before_mib),
    Figure("peak allocated", lambda side: side.peak_allocated_mib),
    Figure("peak reserved", lambda side: side.peak_reserved_mib),
]
STEPS = [
    Figure("step ms, median", lambda side: side.step_ms.median if side.step_ms else None, "{:,.1f}"),
    Figure("20th percentile", lambda side: side.step_ms.p20 if side.step_ms else None, "{:,.1f}"),
    Figure("80th percentile", lambda side: side.step_ms.p80 if side.step_ms else None, "{:,.1f}"),
    Figure("tokens/s", lambda side: side.tokens_per_s),
    Figure("of the matmul ceiling", lambda side: side.ceiling_share and 100 * side.ceiling_share, "{:.1f} %"),
]


def bench_page(record: BenchRecord) -> Page:
    """The whole comparison. What it comes to stands last: where the eye is when it ends."""
    measured, warm_up = len(record.ours.steps_s), len(record.ours.losses) - len(record.ours.steps_s)
    steps = f"{counted(measured, 'step')}, each timed alone, after {warm_up} that are not counted"
    memory = "MiB, resident, on a CPU" if on_cpu(record.start.device) else "MiB, VRAM"
    return Page(
        title=f"bench of recipe {record.start.recipe}",
        facts=_facts(record),
        sections=[
            Section("Start", [_table(record, _phases(record))], "seconds from the start of the process"),
            Section("Memory", [_table(record, MEMORY)], memory),
            _losses(record),
            Section("Steps", [_table(record, STEPS)], steps),
            notes(record.notes),
            verdicts(record.verdicts),
            Section("", [Styled(text, "strong") for text in _outcome(record)]),
        ],
    )


def _facts(record: BenchRecord) -> list[tuple[Value, Value]]:
    start, compiled, ceiling, work = record.start, record.compile, record.ceiling, record.workload
    graphs = f"{counted(compiled.planned_graphs, 'graph')} of {compiled.expected_graphs} planned"
    events = f"{counted(compiled.graph_breaks, 'graph break')}, {counted(compiled.recompiles, 'recompile')}"
    cached = f"{counted(compiled.cache_hits, 'hit')} of the compile cache"
    autocast = "" if start.dtype == "float32" else f", autocast to {start.dtype}"
    stock = f"stock transformers, PEFT and bitsandbytes{autocast}"
    plain = "the same without gradient checkpointing" if record.naive else f"{stock}, no gradient checkpointing"
    passes = f"{extent(work.naive_passes)} a step, padded, for our {whole(start.accumulation)}"
    shape = f"{start.micro_batch} × {', '.join(map(whole, start.widths))} × accumulation {start.accumulation}"
    rows = "random rows" if record.rows == "random" else "the recipe's data"
    product = f"{_flops(ceiling.flops_per_s)}: the fastest {ceiling.dtype} product of {ceiling.size:,}²"
    return [
        *model_facts(start),
        ("ours", f"{start.compile} · attention {start.attention} · {graphs}, {events}, {cached}"),
        ("CUDA graphs", start.cuda_graphs),
        ("activations", start.activations),
        *([("naive", f"{stock}, with gradient checkpointing")] if record.naive else []),
        *([("plain", plain)] if record.plain else []),
        *([("its passes", passes)] if _naive_sides(record) else []),
        ("shared", f"seed, adapters, batches, optimizer ({start.optimizer})"),
        ("a step", f"{shape} of {rows}"),
        ("its tokens", f"{extent(work.tokens)}, of them {extent(work.supervised_tokens)} targets"),
        ("ceiling", product),
        *note_facts(start.notes),
    ]


def _flops(per_s: float) -> str:
    return f"{per_s / 1e12:,.0f} TFLOP/s" if per_s >= 1e13 else f"{per_s / 1e9:,.1f} GFLOP/s"


def _phases(record: BenchRecord) -> list[Figure]:
    def phase(name: str) -> Figure:
        return Figure(name, lambda side: side.phases_s.get(name), "{:,.1f}")

    names = dict.fromkeys(name for side in (record.ours, record.naive, record.plain) if side for name in side.phases_s)
    return [*map(phase, names), Figure("to the end of the first step", lambda side: side.first_step_s, "{:,.1f}")]


def _table(record: BenchRecord, rows: Sequence[Figure]) -> Table:
    ours, naive = record.ours, _naive_sides(record)
    return Table(
        [
            Column("", [row.label for row in rows], numeric=False),
            *(Column(name, [row.shown(side) for row in rows]) for name, side in naive.items()),
            Column("ours", [Styled(row.shown(ours), "strong") for row in rows]),
            *(Column(f"ours to {name}", [row.ratio(ours, side) for row in rows]) for name, side in naive.items()),
        ]
    )


def _naive_sides(record: BenchRecord) -> dict[str, SideRecord]:
    sides = {"naive": record.naive, "plain": record.plain}
    return {name: side for name, side in sides.items() if side}


def _first_comparison(record: BenchRecord) -> SpeedComparison:
    """With naive; where that was left out, with plain."""
    return record if record.naive else record.to_plain


def _losses(record: BenchRecord) -> Section:
    ours = record.ours.losses
    steps = sampled(range(len(ours)), LOSSES_SHOWN)
    columns = [Column("step", [f"{n + 1:,}" for n in steps])]
    for name, side in _naive_sides(record).items():
        losses = side.losses
        columns.append(Column(name, [loss(losses[n]) if n < len(losses) else NOTHING for n in steps]))
    columns.append(Column("ours", [loss(ours[n]) for n in steps]))
    if any(side.losses for side in list(_naive_sides(record).values())[:1]):
        columns.append(Column("difference", [_difference(record, n) for n in steps]))
    note = f"mean of a supervised token{sample_note(len(steps), len(ours), 'steps')}"
    return Section("Loss", [Table(columns)], note)


def _difference(record: BenchRecord, step: int) -> Value:
    """Judged at the first step only: after it each side has weights of its own."""
    differences = _first_comparison(record).loss_differences
    if step >= len(differences):
        return NOTHING
    difference = differences[step]
    return flagged(f"{difference:.1e}", step > 0 or difference <= record.loss_tolerance)


def _outcome(record: BenchRecord) -> list[str]:
    ours = record.ours
    assert ours.tokens_per_s is not None and ours.peak_allocated_mib is not None, "our side has finished"
    figures = f"ours {whole(ours.tokens_per_s)} tokens/s, peak {whole(ours.peak_allocated_mib)} MiB"
    lines, comparisons = [], {"naive": record, "plain": record.to_plain}
    for name, side in _naive_sides(record).items():
        compared = comparisons[name]
        if side.failure:
            lines.append(f"{name} ran out of memory" if side.out_of_memory else f"{name} failed")
            continue
        assert compared.speed_up is not None and compared.memory_ratio is not None
        ratios = f"{compared.speed_up:.2f} × the speed of {name}, {compared.memory_ratio:.2f} × its memory"
        beside = "beside plain, " if name == "plain" and record.naive else ""
        lines += [ratios, beside + _pay_back(record, side, compared.pay_back_steps)]
    if lines and _first_comparison(record).speed_up is not None:
        figures = f"{figures}: {lines.pop(0)}"
    return [figures, *lines]


def _pay_back(record: BenchRecord, naive: SideRecord, steps: int | None) -> str:
    assert record.ours.first_step_s is not None and naive.first_step_s is not None
    delay_s = record.ours.first_step_s - naive.first_step_s
    if steps is None:
        return "compile never pays back: our step is not faster"
    when = f"{abs(delay_s):.1f} s {'later' if delay_s > 0 else 'sooner'}"
    return f"compile pays back after {counted(steps, 'step')}: our first step ends {when}"
