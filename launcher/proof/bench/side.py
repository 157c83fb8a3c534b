"""One side of the comparison, from the start of its process to its last measured step.

Each step is timed alone: the device is waited for before and after it, batches are made beforehand, and losses are read
between steps. The first step counts as start-up, the next few as warm-up; the last `proof.bench` are measured.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launcher.errors import LESS_MEMORY, MemoryExhausted
from launcher.memory.ledger import MIB, Ledger
from launcher.proof.bench.ceiling import matmul_ceiling, synchronise
from launcher.proof.bench.naive import NaiveStep
from launcher.proof.bench.workload import WARM_UP_STEPS, bench_inputs, hash_batches, step_batches, steps_of
from launcher.proof.gate import gate_of
from launcher.proof.stock import collate, trainable, write_adapters
from launcher.recipe.lora_section import COMPUTED_STARTS
from launcher.records.bench import OursRecord, SideRecord
from launcher.runtime.clock import Clock, process_age_s
from launcher.train.describe import start_record
from launcher.train.request import Request
from launcher.train.setup import Worker

Batch = TypeVar("Batch")

BEFORE = "before first step"  # a phase of memory


@dataclass
class Measurement:
    """What a side has measured so far: its record can be made at any time, after a failure too."""

    clock: Clock = field(default_factory=Clock)
    ledger: Ledger = field(default_factory=lambda: Ledger(torch.device("cpu")))
    batches: str = ""  # their digest
    losses: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)  # of every step
    first_step_s: float | None = None

    def time_steps(self, step: Callable[[Batch], Tensor], batches: Sequence[Batch], supervised: Sequence[int]) -> None:
        """Run and time `step` (it returns the summed loss) on every batch; `supervised` are their supervised tokens."""
        device = self.ledger.device
        self.ledger.mark(BEFORE)
        for batch, tokens in zip(batches, supervised, strict=True):
            synchronise(device)
            start = time.perf_counter()
            loss = step(batch)
            synchronise(device)
            self.steps_s.append(time.perf_counter() - start)
            self.losses.append(float(loss) / max(1, tokens))
            if self.first_step_s is None:
                self.first_step_s = process_age_s()
                self.clock.elapsed_s["first step"] = self.steps_s[0]
                self.ledger.mark("after first step")
        self.ledger.mark("after steps")

    def record(self, failure: str = "", *, out_of_memory: bool = False) -> SideRecord:
        device = self.ledger.device
        peak = self.ledger.peak_mib()
        reserved = torch.cuda.max_memory_reserved(device) / MIB if device.type == "cuda" else peak
        return SideRecord(
            phases_s=self.clock.elapsed_s,
            first_step_s=self.first_step_s,
            losses=tuple(self.losses),
            steps_s=tuple(self.steps_s[1 + WARM_UP_STEPS :]),
            vram=tuple(self.ledger.phases),
            peak_allocated_mib=peak,
            peak_reserved_mib=reserved,
            batches=self.batches,
            failure=failure,
            out_of_memory=out_of_memory,
            before_mib=next((v.allocated_mib for v in self.ledger.phases if v.phase == BEFORE), None),
        )


def ours(request: Request, *, start: Path | None = None) -> Iterator[str | OursRecord]:
    """Measure what training does: Worker.build, Worker.compile, worker.step. Yields phases and, last, the record. Where
    `start` is given, the adapter that training begins with is written there.

    Raises the errors of launcher/errors.py.
    """
    measurement = Measurement()
    clock = measurement.clock
    try:
        with clock.phase("data"):
            request, prepared = bench_inputs(request)
        yield "ours: loading"
        with clock.phase("load"):
            worker = Worker(request, prepared, clock=clock)
            measurement.ledger = worker.ledger
            worker.build()
        if start:
            save_file({name: value.detach().cpu() for name, value in trainable(worker.built.peft)}, start)
        yield "ours: compiling"
        with clock.phase("compile"):
            worker.compile()
        batches = [next(worker.batches) for _ in range(steps_of(request.recipe))]
        measurement.batches = hash_batches(batches)
        yield f"ours: {len(batches)} steps"
        supervised = [batch.supervised_tokens for batch in batches]
        measurement.time_steps(lambda batch: worker.step(batch).loss_sum, batches, supervised)
        worker.plan.check()
        side = measurement.record()  # before the matrix products, which need memory of their own
        yield "the device's matrix products"
        built = worker.built
        ceiling = matmul_ceiling(built.dtype, prepared.device)
        tolerance = gate_of(built.dtype).loss
        yield OursRecord(side, start_record(worker), worker.observer.record(), ceiling, tolerance, built.loaded)
    except torch.OutOfMemoryError as error:
        memory = measurement.ledger.as_text()
        raise MemoryExhausted(f"our side ran out of memory; held by phase: {memory}.\n{LESS_MEMORY}") from error


def naive(request: Request, *, checkpointed: bool = True, start: Path | None = None) -> Iterator[str | SideRecord]:
    """Measure stock modules in a simple loop, from the adapter in `start` where it is given. Yields phases and, last,
    the record: partial if memory ran out."""
    assert start or request.recipe.lora.init not in COMPUTED_STARTS, "both sides begin with one adapter"
    torch.set_num_threads(request.rank_info.cores)
    name = "naive" if checkpointed else "plain"
    measurement = Measurement()
    clock = measurement.clock
    try:
        with clock.phase("data"):
            request, prepared = bench_inputs(request)
        yield f"{name}: loading"
        measurement.ledger = Ledger(prepared.device)
        with clock.phase("load"):
            step = NaiveStep(request, prepared, checkpointed=checkpointed)
            if start:
                write_adapters(step.model, load_file(start))
        measurement.ledger.mark("after load")
        batches = step_batches(request, prepared)
        measurement.batches = hash_batches(batches)
        padded = [collate(batch, pinned=prepared.device.type == "cuda") for batch in batches]
        yield f"{name}: {len(padded)} steps"
        measurement.time_steps(step, padded, [batch.supervised_tokens for batch in padded])
        yield measurement.record()
    except torch.OutOfMemoryError:
        steps, memory = len(measurement.steps_s), measurement.ledger.as_text()
        when = f"after {steps} steps" if steps else "before its first step ended"
        yield measurement.record(f"out of memory {when}; held by phase: {memory}", out_of_memory=True)
