"""The records that a worker gives of itself: what is about to run, and what this rank did."""

import math
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from launcher.data.loader import TrainLoader
from launcher.data.pack.blocks import blank_step_note
from launcher.recipe.lora_section import LoraSection
from launcher.records.counts import counts_in_words
from launcher.records.run import EvalRecord, Event, Note, RankRecord, StartRecord, StepRecord
from launcher.train.setup import Worker

CPU_INFO = "/proc/cpuinfo"
CPU_UNITS = {  # words of CPU_INFO, of x86 and Arm; without them a product takes 3 to 360 times as long as in fp32
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}
GUESSING = 0.99  # of ln(vocabulary): a first loss from here on is a guess's
INCOMPLETE = ("dropped", "truncated", "split", "repeated", "left_out")  # in names of counts: rows not seen whole, once


def start_record(worker: Worker) -> StartRecord:
    """What is about to run, for the start panel and the report."""
    recipe, built, data = worker.recipe, worker.built, worker.prepared.data
    train, compile, widths = recipe.train, recipe.compile, tuple(sorted(data.widths))
    return StartRecord(
        recipe=worker.request.name,
        model=worker.request.source + (" (random weights)" if recipe.model.init == "random" else ""),
        family=built.family.model_type,
        parameters=built.parameters,
        trainable=built.trainable,
        device=_device_name(worker.accelerator.device),
        world_size=worker.rank_info.world_size,
        dtype=str(built.dtype).removeprefix("torch."),
        quantization=built.quantization,
        attention=f"{built.attention} ({built.attention_why})",
        micro_batch=train.micro_batch,
        widths=widths,
        accumulation=train.accumulation,
        steps=worker.steps,
        epochs=worker.steps / worker.batches.steps_per_epoch if isinstance(worker.batches, TrainLoader) else None,
        lora=adapter_in_words(recipe.lora),
        optimizer=f"{_with_options(train.optimizer, train.optimizer_options)}, lr {train.lr:g}, "
        f"{_with_options(train.schedule, train.schedule_options)}",
        compile="off" if compile.mode == "off" else f"{compile.mode}, scope {compile.scope}, {compile.backend}",
        batching=recipe.data.batching,
        streamed=recipe.data.streaming,
        template=data.template,
        loss_on=data.loss_on,
        train_rows=data.train_rows,
        train_blocks=len(data.first_blocks),
        validation_rows=data.validation_rows,
        fill=data.first_blocks.fill,
        run_dir=str(worker.folder.path),
        cuda_graphs=worker.cuda_graphs,
        activations=_activations(worker),
        forecast_mib=worker.policy.forecast_mib,
        loss_tokens=tuple(built.packed.loss_rows(train.micro_batch * width) for width in widths),
        notes=(
            *worker.untrained_notes,
            *worker.request.notes,
            *_resumed(worker),
            *built.notes,
            *data.notes,
            *_incomplete_rows(data.counts),
            *blank_step_note(
                len(data.first_blocks), train.micro_batch * train.accumulation * worker.rank_info.world_size
            ),
            *slow_dtype_note(built.dtype, worker.accelerator.device),
        ),
    )


def _with_options(name: str, options: dict[str, Any] | None) -> str:
    """A choice and the options that are given for it: `polynomial (power 2.0)`."""
    return f"{name} ({', '.join(f'{key} {value}' for key, value in options.items())})" if options else name


def _activations(worker: Worker) -> str:
    """The activation policy, why, and the host memory it takes: known once every shape has been run."""
    waiting = f", inputs in {worker.host_inputs.host_mib:,.0f} MiB of the host" if worker.host_inputs else ""
    return f"{worker.policy.name} ({worker.policy.why}{waiting})"


def _resumed(worker: Worker) -> tuple[str, ...]:
    """What the run goes on from, and what was wrong with its files."""
    resumed = worker.resumed
    if resumed is None:
        return ()
    return f"goes on from step {resumed.step:,} ({resumed.bundle})", *resumed.notes, *worker.state.notes


def _incomplete_rows(counts: dict[str, int]) -> tuple[str, ...]:
    """A note when rows did not reach training whole and exactly once, with the data's counts by reason."""
    reasons = {key: count for key, count in counts.items() if count and any(word in key for word in INCOMPLETE)}
    return (f"data: {counts_in_words(reasons)}",) if reasons else ()


def slow_dtype_note(dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """A note when the CPU has no instructions for the dtype."""
    if device.type != "cpu" or dtype not in CPU_UNITS or not os.path.exists(CPU_INFO):
        return ()
    with open(CPU_INFO, encoding="utf-8", errors="replace") as file:
        if CPU_UNITS[dtype] & set(file.read().split()):
            return ()
    name = str(dtype).removeprefix("torch.")
    return (f"{name} is slow on this CPU, which has no instructions for it; model.dtype=float32 is many times as fast",)


def with_base_notes(events: Iterator[Event], worker: Worker) -> Iterator[Event]:
    """The same events, and after the first loss the note that it may give cause for."""
    first = True
    for event in events:
        yield event
        if first and isinstance(event, StepRecord | EvalRecord):
            yield from map(Note, base_notes(worker, [event]))
            first = False


def base_notes(worker: Worker, measured: Sequence[StepRecord | EvalRecord]) -> tuple[str, ...]:
    """A note when the first loss of a trained base, measured before any update, is no better than a guess's."""
    vocabulary, pretrained = worker.built.packed.head.weight.shape[0], worker.recipe.model.init == "pretrained"
    return first_loss_note(measured[0], vocabulary) if pretrained and measured else ()


def first_loss_note(first: StepRecord | EvalRecord, vocabulary: int) -> tuple[str, ...]:
    """A note when the loss of a run's first record is at or above ln(vocabulary); of a later record nothing is said."""
    loss, guess = first.eval_loss if isinstance(first, EvalRecord) else first.loss, math.log(vocabulary)
    if loss < GUESSING * guess or first.step > 1:
        return ()
    return (
        f"the base should predict better than a guess; its first loss is {loss:.2f}, and that of a guess among "
        f"{vocabulary:,} tokens ln({vocabulary:,}) = {guess:.2f}. Its weights are damaged or untrained, or "
        "tokenizer and weights do not belong together: download both again",
    )


def adapter_in_words(lora: LoraSection) -> str:
    """As "r 16, alpha 32 · dora, init pissa": keys at their defaults are left out."""
    given = lora.model_dump(exclude_defaults=True, exclude={"r", "alpha"})
    others = ", ".join(key if value is True else f"{key} {value}" for key, value in given.items())
    return " · ".join(filter(None, (f"r {lora.r}, alpha {lora.alpha:g}", others)))


def _device_name(device: torch.device, *, index: bool = False) -> str:
    if device.type != "cuda":
        return "CPU"
    return (f"cuda:{device.index or 0} " if index else "") + torch.cuda.get_device_name(device)


def rank_record(worker: Worker, *, step_s: Sequence[float], tokens: Sequence[tuple[int, int]]) -> RankRecord:
    """What this process did, from the seconds of its steady steps and their tokens (all, supervised)."""
    ledger = worker.ledger
    phases = {record.phase: record for record in ledger.phases}
    all_tokens, supervised_tokens = (sum(counts) for counts in zip(*(tokens or [(0, 0)]), strict=True))
    step_s = step_s or [math.inf]  # a run that was resumed after its last step
    return RankRecord(
        rank=worker.rank_info.rank,
        device=_device_name(worker.accelerator.device, index=True),
        compile=worker.observer.record(),
        vram=tuple(ledger.phases),
        vram_before_mib=phases.get("after capture", phases["after compile"]).allocated_mib,
        vram_after_mib=phases["after training"].allocated_mib,
        vram_peak_mib=ledger.peak_mib(),
        tokens_per_s=all_tokens / sum(step_s),
        supervised_tokens_per_s=supervised_tokens / sum(step_s),
        step_ms_median=statistics.median(step_s) * 1000,
        step_ms_p90=sorted(step_s)[math.ceil(0.9 * len(step_s)) - 1] * 1000,
    )
