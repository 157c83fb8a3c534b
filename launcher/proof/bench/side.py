"""One side of the comparison, from the start of its process to its last measured step.

A step is timed alone: the device is waited for before and after it, batches are made beforehand, losses are read
between two steps. The first step belongs to the start; the next few warm up; the last `proof.bench` are measured.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from launcher.errors import LESS_MEMORY, MemoryExhausted
from launcher.memory.ledger import MIB, Ledger
from launcher.proof.bench.ceiling import matmul_ceiling, synchronise
from launcher.proof.bench.naive import NaiveStep, collate
from launcher.proof.bench.workload import WARM_UP_STEPS, bench_data, bench_request, digest, step_batches, steps_of
from launcher.proof.gate import gate_of
from launcher.records.bench import OursRecord, SideRecord
from launcher.runtime.clock import Clock, process_age_s
from launcher.train.describe import start_record
from launcher.train.request import Request
from launcher.train.setup import Worker

T = TypeVar("T")

BEFORE = "before first step"  # a phase of memory


@dataclass
class Log:
    """What a side has measured so far; also what a failure can still tell."""

    clock: Clock = field(default_factory=Clock)
    ledger: Ledger = field(default_factory=lambda: Ledger(torch.device("cpu")))
    batches: str = ""
    losses: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)  # of every step
    first_step_s: float | None = None

    def take(self, step: Callable[[T], Tensor], batches: Sequence[T], supervised: Sequence[int]) -> None:
        """Every step, timed alone; `supervised` are its tokens that have a loss."""
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


def ours(request: Request) -> Iterator[str | OursRecord]:
    """What training does: Worker.build, Worker.compile, worker.step. Yields phases and, last, the record.

    Raises the errors of launcher/errors.py.
    """
    log, request = Log(), bench_request(request)
    try:
        yield from _ours(request, log)
    except torch.OutOfMemoryError as error:
        raise MemoryExhausted(
            f"our side ran out of memory; held by phase: {log.ledger.as_text()}.\n{LESS_MEMORY}"
        ) from error


def _ours(request: Request, log: Log) -> Iterator[str | OursRecord]:
    with log.clock.phase("data"):
        prepared = bench_data(request)
    yield "ours: loading"
    with log.clock.phase("load"):
        worker = Worker(request, prepared, clock=log.clock)
        log.ledger = worker.ledger
        worker.build()
    yield "ours: compiling"
    with log.clock.phase("compile"):
        worker.compile()
    batches = [next(worker.batches) for _ in range(steps_of(request.recipe))]
    log.batches = digest(batches)
    yield f"ours: {len(batches)} steps"
    log.take(lambda batch: worker.step(batch).loss_sum, batches, [batch.supervised_tokens for batch in batches])
    worker.plan.check()
    side = log.record()  # before the products, which need memory of their own
    yield "the device's matrix products"
    yield OursRecord(
        side,
        start_record(worker),
        worker.observer.record(),
        matmul_ceiling(worker.built.dtype, prepared.device),
        gate_of(worker.built.dtype).loss,
    )


def naive(request: Request) -> Iterator[str | SideRecord]:
    """Stock modules in a plain loop. Yields phases and, last, the record; where memory ran out, what there was until
    then."""
    log, request = Log(), bench_request(request)
    try:
        yield from _naive(request, log)
    except torch.OutOfMemoryError:
        taken = f"after {len(log.steps_s)} steps" if log.steps_s else "before its first step ended"
        yield log.record(f"out of memory {taken}; held by phase: {log.ledger.as_text()}", out_of_memory=True)


def _naive(request: Request, log: Log) -> Iterator[str | SideRecord]:
    torch.set_num_threads(request.rank_info.cores)
    with log.clock.phase("data"):
        prepared = bench_data(request)
    yield "naive: loading"
    log.ledger = Ledger(prepared.device)
    with log.clock.phase("load"):
        step = NaiveStep(request, prepared)
    log.ledger.mark("after load")
    batches = step_batches(request, prepared)
    log.batches = digest(batches)
    collated = [collate(batch, pinned=prepared.device.type == "cuda") for batch in batches]
    yield f"naive: {len(collated)} steps"
    log.take(step, collated, [batch.supervised_tokens for batch in collated])
    yield log.record()
