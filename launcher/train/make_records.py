"""What a worker says of itself: the record of what is about to run, and that of what this rank did."""

import math
import statistics
from collections.abc import Sequence

import torch

from launcher.data.loader import TrainLoader
from launcher.records.run import RankRecord, StartRecord
from launcher.train.planned import planned_widths
from launcher.train.setup import Worker

LEFT_OUT = ("dropped", "truncated", "split", "repeated", "left_out")  # in the counts' names


def start_record(worker: Worker) -> StartRecord:
    """What is about to run, for the start panel and the report."""
    recipe, built, data = worker.recipe, worker.built, worker.prepared.data
    c, widths = recipe.compile, planned_widths(data)[::-1]
    loss_tokens = [built.packed.loss_rows(recipe.train.micro_batch * width) for width in widths]
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
        micro_batch=recipe.train.micro_batch,
        widths=tuple(widths),
        accumulation=recipe.train.accumulation,
        steps=worker.steps,
        epochs=worker.steps / worker.batches.steps_per_epoch if isinstance(worker.batches, TrainLoader) else None,
        optimizer=f"{recipe.train.optimizer}, lr {recipe.train.lr:g}, {recipe.train.schedule}",
        compile="off" if c.mode == "off" else f"{c.mode}, scope {c.scope}, {c.backend}",
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
        loss_tokens=tuple(loss_tokens),
        notes=worker.request.notes + data.notes + _left_out(data.counts) + _short(worker),
    )


def _activations(worker: Worker) -> str:
    """The policy, why, and what it takes of the host: once every shape has been seen."""
    waiting = f", inputs in {worker.host_inputs.host_mib:,.0f} MiB of the host" if worker.host_inputs else ""
    return f"{worker.policy.name} ({worker.policy.why}{waiting})"


def _short(worker: Worker) -> tuple[str, ...]:
    """A note when a step is larger than an epoch: the rest of it is blank."""
    train, blocks = worker.recipe.train, len(worker.prepared.data.first_blocks)
    rows = train.micro_batch * train.accumulation * worker.rank_info.world_size
    if blocks >= rows:
        return ()
    return (f"a step holds {rows} rows and the data only {blocks}: lower train.micro_batch or train.accumulation",)


def _left_out(counts: dict[str, int]) -> tuple[str, ...]:
    """A note when rows did not reach training whole, or not once: by reason, as the data counted them."""
    kinds = {key: n for key, n in counts.items() if n and any(word in key for word in LEFT_OUT)}
    return (f"data: {', '.join(f'{n:,} {key}' for key, n in kinds.items())}",) if kinds else ()


def _device_name(device: torch.device, *, index: bool = False) -> str:
    if device.type != "cuda":
        return "CPU"
    return (f"cuda:{device.index or 0} " if index else "") + torch.cuda.get_device_name(device)


def rank_record(worker: Worker, *, step_s: Sequence[float], tokens: Sequence[tuple[int, int]]) -> RankRecord:
    """This process's account, from the seconds of its steady steps and their tokens (all, supervised)."""
    phases = {p.phase: p for p in worker.ledger.phases}
    return RankRecord(
        rank=worker.rank_info.rank,
        device=_device_name(worker.accelerator.device, index=True),
        compile=worker.observer.record(),
        vram=tuple(worker.ledger.phases),
        vram_before_mib=phases.get("after capture", phases["after compile"]).allocated_mib,
        vram_after_mib=phases["after training"].allocated_mib,
        vram_peak_mib=worker.ledger.peak_mib(),
        tokens_per_s=sum(t for t, _ in tokens) / sum(step_s),
        supervised_tokens_per_s=sum(s for _, s in tokens) / sum(step_s),
        step_ms_median=statistics.median(step_s) * 1000,
        step_ms_p90=sorted(step_s)[math.ceil(0.9 * len(step_s)) - 1] * 1000,
    )
