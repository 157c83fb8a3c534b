"""The summary of a run: losses, what each rank did, what it cost, whether each claim holds, what to do next."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.records.run import EvalRecord, RankRecord, RunPart, RunRecord, Sample, StepRecord
from launcher.report.pages import formatting
from launcher.report.pages.formatting import counted, extent, on_cpu, whole
from launcher.report.pages.page import Column, Facts, Item, Page, Section, Styled, Table, Value, flagged
from launcher.report.pages.ranks import event_sections, rank_sections
from launcher.report.pages.sections import elapsed, notes, sampled, verdicts

STEPS_SHOWN = 12  # rows of the loss table that are steps; longer runs are sampled, first and last step included
EVALS_SHOWN = 6
SAMPLE_SHOWN = 1200  # characters of a sample's text; of a longer one the beginning and the end


def run_page(run: RunRecord) -> Page:
    """The whole run. What has been learned comes first; the verdicts and what to do next stand where the eye is when it
    ends."""
    return Page(list(_sections(run)))


def _sections(run: RunRecord) -> Iterator[Section]:
    yield loss_section(run.steps, run.evals, run.eval_adapter)
    yield _sample(run.sample, run.no_sample)
    yield from rank_sections(run.ranks)
    yield _memory(run.ranks, run.start.forecast_mib)
    yield from event_sections(run.ranks)
    yield elapsed(run.elapsed_s)
    yield parts_section(run.parts)
    yield notes(run.notes)
    yield verdicts(run.verdicts)
    stopped = [Styled(f"stopped {run.stopped}", "strong")] if run.stopped else []
    yield Section("", [*stopped, Styled(_total(run.ranks), "strong"), f"run folder {run.start.run_dir}"])
    if run.adapter is not None and all(verdict.holds for verdict in run.verdicts):
        raises = "train.patience" if run.stopped else "train.steps"
        yield _next(run.adapter, run.start.run_dir, raises=raises if run.recipe["train"]["save_every"] != 0 else "")


def _memory(ranks: Sequence[RankRecord], forecast_mib: float | None) -> Section:
    """Memory at the end of each phase, of the rank with the highest peak: the one that runs out first. Under it, the
    forecast that chose the activation policy, and how near it was."""
    rank = max(ranks, key=lambda r: r.vram_peak_mib)
    cpu = on_cpu(rank.device)
    columns = [
        Column("phase", [v.phase for v in rank.vram], numeric=False),
        Column("resident\nMiB" if cpu else "allocated\nMiB", [whole(v.allocated_mib) for v in rank.vram]),
        Column("reserved\nMiB", [whole(v.reserved_mib) for v in rank.vram]),
        Column("peak\nMiB", [whole(v.peak_mib) for v in rank.vram]),
        Column("machine total\nMiB" if cpu else "device total\nMiB", [whole(v.total_mib) for v in rank.vram]),
    ]
    if cpu:
        del columns[2]  # the same figure as the resident memory
    items: list[Item] = [Table(columns)]
    if forecast_mib is not None:
        peaks = f"peak forecast {whole(forecast_mib)} MiB, measured {whole(rank.vram_peak_mib)} MiB"
        items.append(f"{peaks} ({100 * (rank.vram_peak_mib / forecast_mib - 1):+.1f} %)")
    of_several = f", the highest peak of {len(ranks)} ranks" if len(ranks) > 1 else ""
    return Section("Resident memory by phase" if cpu else "VRAM by phase", items, f"rank {rank.rank}{of_several}")


def parts_section(parts: Sequence[RunPart]) -> Section:
    """The starts of a run that was resumed: where each ran, the steps of it that count, what was done again."""
    steps = [f"{p.first_step:,} to {p.last_step:,}" if p.last_step >= p.first_step else "none" for p in parts]
    columns = [
        Column("start", [f"{number:,}" for number in range(1, len(parts) + 1)]),
        Column("host", [part.host for part in parts], numeric=False),
        Column("steps", steps),
        Column("done again\ns", [f"{part.lost_s:,.1f}" for part in parts]),
    ]
    return Section("Starts of this run", [Table(columns)] if len(parts) > 1 else [])


def loss_section(
    steps: Sequence[StepRecord], evals: Sequence[EvalRecord], eval_adapter: float | None = None
) -> Section:
    """A row for each step (a sample of a long run), with the eval loss after it. `eval_adapter`: that of the adapter
    which was saved, told where it is not the last step's."""
    shown_steps, shown_evals = sampled(steps, STEPS_SHOWN), sampled(evals, EVALS_SHOWN)
    items: list[Item] = [Table(_loss_columns(shown_steps, shown_evals))] if steps or evals else []
    changes = [("loss", [s.loss for s in steps]), ("eval loss", [e.eval_loss for e in evals])]
    texts = [f"{name} {change(values[0], values[-1])}" for name, values in changes if len(values) > 1]
    if evals and eval_adapter is not None and eval_adapter != evals[-1].eval_loss:
        texts.append(f"of the saved adapter, the best step's: {formatting.loss(eval_adapter)}")
    if texts:
        items.append(" · ".join(texts))
    marked = {
        "skipped by the fp16 loss scaler (overflow)": [f"{s.step:,}" for s in steps if s.skipped],
        "spiked (the first ones' batches are in bad_batches/)": [f"{s.step:,}" for s in steps if s.spike],
    }
    for what, numbers in marked.items():
        if numbers:
            names = ", ".join([*numbers[:STEPS_SHOWN], *(["…"] if len(numbers) > STEPS_SHOWN else [])])
            items.append(Styled(f"{counted(len(numbers), 'step')} {what}: {names}", "warning"))
    is_sample = len(shown_steps) < len(steps) or len(shown_evals) < len(evals)
    note = f"{len(shown_steps)} of {counted(len(steps), 'step')}; all are in metrics.jsonl" if is_sample else ""
    return Section("Loss", items, note)


def _loss_columns(steps: Sequence[StepRecord], evals: Sequence[EvalRecord]) -> list[Column]:
    eval_losses = {e.step: e.eval_loss for e in evals}
    rows = sorted({*(s.step for s in steps), *eval_losses})

    def column(header: str, texts: dict[int, str], priority: int = 0) -> Column:
        cells = [texts.get(n, "") for n in rows]
        return Column(header, [flagged(text, text not in ("nan", "inf", "-inf")) for text in cells], priority)

    return [
        Column("step", [f"{n:,}" for n in rows]),
        column("loss", {s.step: formatting.loss(s.loss) for s in steps}),
        column("lr", {s.step: f"{s.lr:.2e}" for s in steps}),
        column("grad norm", {s.step: formatting.norm(s.grad_norm) for s in steps}, priority=1),
        column("tok/s", {s.step: formatting.rate(s.tokens, s.step_s) for s in steps}),
        column("step ms", {s.step: f"{s.step_s * 1000:,.1f}" for s in steps}, priority=2),
        column("eval loss", {n: formatting.loss(value) for n, value in eval_losses.items()}),
    ]


def change(first: float, last: float) -> str:
    """From the first to the last value, with the relative change: "2.9134 → 1.4711 (-49.5 %)"."""
    relative = f" ({100 * (last - first) / first:+.1f} %)" if first else ""
    return f"{formatting.loss(first)} → {formatting.loss(last)}{relative}"


def _sample(sample: Sample | None, no_sample: str) -> Section:
    if sample is None:
        return Section("Sample", [f"none: {no_sample}"] if no_sample else [])
    rows: list[tuple[Value, Value]] = [
        ("prompt", _shortened(sample.prompt)),
        ("expected", _shortened(sample.expected)),
        ("generated", Styled(_shortened(sample.generated), "strong")),
    ]
    return Section("Sample", [Facts(rows)], "validation prompt, greedy answer of the trained model")


def _shortened(text: str) -> str:
    text, half = text.strip("\n"), SAMPLE_SHOWN // 2
    left_out = len(text) - 2 * half
    if left_out > 0:
        return f"{text[:half]} … ({left_out:,} characters left out) … {text[-half:]}"
    return text or "(nothing)"


def _next(adapter: str, run_dir: str, *, raises: str) -> Section:
    """What can be done with the adapter: three lines of stock code, two commands, and where this is explained.
    `raises`: the key that makes the run go on; "" where it left no checkpoint."""
    code = (
        "from peft import AutoPeftModelForCausalLM",
        f"adapter = {adapter!r}",
        "model = AutoPeftModelForCausalLM.from_pretrained(adapter)",
    )
    more_steps = f"raise {raises} and name this run.output_dir again; other data: lora.start_from names this adapter"
    merge = "export it, and train the result with model.name=./my-model"
    rows: list[tuple[Value, Value]] = [
        ("load", "\n".join(code)),
        ("talk to it", f"{_program()} mode=generate run={shlex.quote(run_dir)}"),
        ("export it", f"{_program()} mode=export run={shlex.quote(run_dir)} to=./my-model"),
        ("continue", more_steps if raises else merge),
        ("how", "docs/export.md: answers, a merged model and its proof; docs/adapter.md: the adapter in stock code"),
    ]
    return Section("Next", [Facts(rows)])


def _program() -> str:
    """As this process was started: commands are to be copied."""
    return "qlora-launcher" if Path(sys.argv[0]).name == "qlora-launcher" else "python launcher/main.py"


def _total(ranks: Sequence[RankRecord]) -> str:
    process = "in this process" if len(ranks) == 1 else "per process"
    compilations = f"{extent([r.compile.compilations for r in ranks])} compilations {process}"
    speed = f"{whole(sum(r.tokens_per_s for r in ranks))} tokens/s"
    memory = "resident" if on_cpu(ranks[0].device) else "VRAM"
    return f"{compilations} · {speed} · peak {whole(max(r.vram_peak_mib for r in ranks))} MiB {memory}"
