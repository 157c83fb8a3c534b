"""Records of every kind as runs make them, and what a plain console shows of them."""

import io
import re
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from typing import Any

from rich.console import Console

from launcher.proof.bench.figures import bench_record
from launcher.records.bench import BenchRecord, Ceiling, OursRecord, SideRecord, Workload
from launcher.records.parity import AdapterParity, Gate, Length, Pair, ParityBatch, ParityRecord
from launcher.records.preview import BlockPreview, DocumentPreview, LengthBin, PreviewRecord, TextPart
from launcher.records.run import (
    CompileRecord,
    EvalRecord,
    GraphRecord,
    RankRecord,
    RunRecord,
    Sample,
    StartRecord,
    StepRecord,
    Verdict,
    VramRecord,
)
from launcher.report.pages import page_of
from launcher.report.pages.page import Styled
from launcher.report.render import print_page

GPU = "NVIDIA H200"
PHASES = ("before load", "after load", "after adapters", "after compile", "after training")
HOSTILE = "[red]x[/nope]\x1b[31m\x07\x9b\r\b\ud800:smile:"  # markup, control codes and a lone surrogate
ESCAPED = "[red]x[/nope]\\x1b[31m\\x07\\x9b\\r\\x08\\ud800:smile:"


def shown(record: Any, console: Console | None = None, *, width: int = 120) -> str:
    """The page of a record, or a page, on a console: one without a terminal unless another is given."""
    console = console or Console(width=width, force_terminal=False)
    console.file = stream = io.StringIO()
    print_page(console, page_of(record) or record)
    return stream.getvalue()


def without_codes(text: str) -> str:
    """The text without the control codes of a terminal."""
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", text)


def section(text: str, title: str) -> list[str]:
    """The lines of a section, its heading included, with single blanks between words."""
    assert f"\n─ {title}" in f"\n{text}", f"no section {title}"
    part = f"\n{text}".split(f"\n─ {title}", 1)[1].split("\n─ ")[0]
    return [" ".join(line.split()) for line in f"{title}{part}".splitlines()]


def parts_of(item: Any) -> Iterator[Any]:
    """Everything that a page is made of, the page included."""
    if not isinstance(item, list | tuple):
        yield item
    for part in item if isinstance(item, list | tuple) else vars(item).values() if is_dataclass(item) else ():
        yield from parts_of(part)


def bad(record: object) -> list[str]:
    """The texts that the page of a record shows as bad."""
    return [part.text for part in parts_of(page_of(record)) if isinstance(part, Styled) and part.style == "bad"]


def start_record(**changes: Any) -> StartRecord:
    record = StartRecord(
        recipe="own [bold]", model="unsloth/Llama-3.2-1B-Instruct", family="llama", parameters=1_247_086_592,
        trainable=11_272_192, device=GPU, world_size=2, dtype="bfloat16", quantization="nf4, double quantised",
        attention="varlen: native kernel, one call for all documents of a block", micro_batch=2, widths=(2048,),
        accumulation=4, steps=100, epochs=6.4, optimizer="adamw (fused)", compile="strict, scope layer, inductor",
        batching="packed", streamed=False, template="the tokenizer's own", loss_on={"assistant": 3412},
        train_rows=3412, train_blocks=251, validation_rows=180, fill=0.973, run_dir="runs/llama1b-20260301-120000",
        notes=("dtype auto: bfloat16, compute capability 9.0",), cuda_graphs="on",
    )  # fmt: skip
    return replace(record, **changes)


def compile_record(**changes: Any) -> CompileRecord:
    record = CompileRecord(
        planned_graphs=3, expected_graphs=3, compilations=6, graph_breaks=0, recompiles=0, limit_hits=0,
        forward_s=12.34, backward_s=20.15, cache_hits=2, graph_hash="9f86d081884c7d659a2feaa0c55ad015",
        graphs_by_region={"layer": 2, "loss": 1}, steps=8, steps_compiled=8, evaluations=4, evaluations_compiled=4,
        graphs=(
            GraphRecord("layer", 49, {"qlora.linears": 3, "qlora.rotary": 1}, "a"),
            GraphRecord("layer", 49, {"qlora.linears": 3, "qlora.rotary": 1}, "b"), GraphRecord("loss", 24, {}, "c"),
        ),
        calls={"layer": 16, "layer backward": 16, "loss": 2},
    )  # fmt: skip
    return replace(record, **changes)


def step_record(step: int, **changes: Any) -> StepRecord:
    record = StepRecord(
        step=step, loss=2.5 / (1 + step / 20), lr=2e-4, grad_norm=0.731, tokens=31_871, supervised_tokens=9_120,
        step_s=0.4231, vram_mib=7_491.3,
    )  # fmt: skip
    return replace(record, **changes)


def rank_record(rank: int, *, device: str = GPU, peak_mib: float = 7_491.2, **compile_changes: Any) -> RankRecord:
    vram = tuple(VramRecord(phase, 1_000.0 * i, 1_200.0 * i, peak_mib, 143_771.0) for i, phase in enumerate(PHASES))
    return RankRecord(
        rank=rank, device=device, compile=compile_record(**compile_changes), vram=vram, vram_before_mib=1_871.4,
        vram_after_mib=1_902.8, vram_peak_mib=peak_mib, tokens_per_s=75_312.4, supervised_tokens_per_s=21_544.0,
        step_ms_median=423.1, step_ms_p90=431.9,
    )  # fmt: skip


def run_record(*ranks: RankRecord, steps: int = 8, **changes: Any) -> RunRecord:
    record = RunRecord(
        recipe={"train": {"save_every": "10m"}}, start=start_record(),
        steps=tuple(step_record(n) for n in range(1, steps + 1)),
        evals=(EvalRecord(0, 2.9134), EvalRecord(steps, 1.4711)),
        eval_adapter=1.4711,
        elapsed_s={"data": 3.21, "load": 14.9, "compile": 41.0, "train": 102.7, "save": 0.8},
        ranks=ranks or (rank_record(0),), verdicts=(Verdict("no graph break", True, "0 breaks on 1 rank"),),
        sample=Sample("define [green]lexicon[/]", "a list of words", "a book of words"), adapter="/runs/own/adapter",
    )  # fmt: skip
    return replace(record, **changes)


def parity_batch(number: int) -> ParityBatch:
    return ParityBatch(number, 1_234, Pair(2.5, 2.6), 2.75, 1e-4, 0.99999, Pair(1e-3, 2e-3), Pair(0.01, 0.02))


def parity_record(**changes: Any) -> ParityRecord:
    record = ParityRecord(
        recipe={}, start=start_record(widths=(64, 128), world_size=1), compile=compile_record(),
        gate=Gate(loss=2e-3, cosine=0.995, error_ratio=1.2, error_floor=0.0, eager_error=0.3, loss_batches=16),
        batches=(parity_batch(1), parity_batch(2)),
        adapters=(
            AdapterParity("q", "A", 16, 0.999999, "layer 3, batch 2", 4e-3, 0.97, 0.98),
            AdapterParity("k", "B", 16, 0.9987, "layer 3, batch 2", 4e-3, 0.97, 0.98),
        ),
        lengths=(Length("q A", 1.001, 0.999, 0.01), Length("k B", 1.009, 0.999, 0.01)),
        loss_error=Pair(1e-3, 2e-3), gradient_error=Pair(0.011, 0.010), verdicts=(Verdict("loss", True, "small"),),
        elapsed_s={"eager": 2.0}, notes=("measured with lora.dropout=0",),
    )  # fmt: skip
    return replace(record, **changes)


def bench_side(seconds: float = 0.5, *, first_s: float = 5.0, loss: float = 2.5, **changes: Any) -> SideRecord:
    """Four steps, of which two are measured."""
    side = SideRecord(
        phases_s={"imports": 1.0, "first step": first_s - 1}, first_step_s=first_s, losses=(loss, 2.0, 1.5, 1.0),
        steps_s=(seconds, seconds), vram=(VramRecord("before first step", 400.0, 500.0, 600.0, 9_000.0),),
        peak_allocated_mib=2_000.0, peak_reserved_mib=2_100.0, batches="abc", before_mib=400.0,
    )  # fmt: skip
    return replace(side, **changes)


NAIVE = bench_side()
WORKLOAD = Workload((90, 90, 100, 100), (50,) * 4, (9_000, 9_000, 10_000, 10_000), (4, 5, 4, 8), "abc")
OURS = OursRecord(
    bench_side(0.1, first_s=20.0, peak_allocated_mib=1_000.0, peak_reserved_mib=1_100.0),
    start_record(device="cpu", widths=(64, 128), world_size=1), compile_record(),
    Ceiling("bfloat16", 8192, 2e5), loss_tolerance=2e-3,
)  # fmt: skip


def bench_of(
    naive: SideRecord | None = NAIVE,
    *,
    plain: SideRecord | None = None,
    rows: str = "data",
    notes: tuple[str, ...] = (),
    **ours: Any,
) -> BenchRecord:
    """Naive sides against OURS, whose side is changed by the fields in `ours`."""
    sides = {name: side for name, side in (("naive", naive), ("plain", plain)) if side is not None}
    changed = replace(OURS, side=replace(OURS.side, **ours))
    return bench_record({}, rows=rows, workload=WORKLOAD, ours=changed, sides=sides, notes=notes)


QUESTION = DocumentPreview(
    1_205, 12, 5,
    (
        TextPart("<|user|>", False, special=True), TextPart("Was heißt 你好?\nSay it.", False),
        TextPart("<|assistant|>", False, special=True), TextPart("Hello 👍", True),
        TextPart("<|end|>", True, special=True),
    ),
)  # fmt: skip
PLAIN_TEXT = DocumentPreview(3, 4, 3, (TextPart("a", False), TextPart(" river\n", True)))


def preview_record(*documents: DocumentPreview, **changes: Any) -> PreviewRecord:
    block = BlockPreview(64, documents or (QUESTION, PLAIN_TEXT), padding=48)
    record = PreviewRecord(
        recipe="own", model="/models/base", tokenizer="LlamaTokenizer, 4,096 tokens", template="llama3",
        loss_on="auto", loss_on_found={"assistant": 4_100, "all": 1}, batching="packed", max_length=64,
        widths=((64, 1_340),), blocks=(block, block), total_blocks=1_340, part="an epoch",
        train_rows=4_101, documents=4_102, tokens=80_000, supervised_tokens=20_000, fill=0.973,
        lengths=(LengthBin(4, 10, 4_100), LengthBin(11, 17, 2)), validation_rows=216, validation_blocks=3,
        counts={
            "rows_read": 4_330, "rows_dropped_no_answer": 13, "truncated": 2, "documents": 4_102, "tokens": 80_000,
            "supervised_tokens": 20_000, "validation_documents": 216,
        },
        notes=("data: read from the cache",),
    )  # fmt: skip
    return replace(record, **changes)
