"""The run: a generator of records on every rank. It never prints; the console and the exit code are the caller's.

Yields, in order: phase names (str), one StartRecord, StepRecords and EvalRecords as they come, one RunRecord.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from launcher.checkpoint.adapter import prove_adapter, save_adapter
from launcher.data.loader import MicroBatch
from launcher.errors import CheckpointError, ContractError, LauncherError, NonFiniteError
from launcher.records.run import EvalRecord, RunRecord, StartRecord, StepRecord, Verdict
from launcher.runtime.clock import Clock
from launcher.runtime.ranks import broadcast, gather
from launcher.runtime.signals import raise_if_stopped
from launcher.train.describe import rank_record, start_record
from launcher.train.metrics import MetricsReader, StepMetrics
from launcher.train.request import Request
from launcher.train.sample import generate
from launcher.train.setup import Worker, prepare_inputs
from launcher.train.verdicts import compile_verdicts, loss_verdict

Event = str | StartRecord | StepRecord | EvalRecord | RunRecord
SKIPS_IN_A_ROW = 20  # fp16: a scale that halves this often without one good step will not recover


@dataclass
class Progress:
    """What the run has so far; also what a failure can still tell."""

    steps: list[StepRecord] = field(default_factory=list)
    evals: list[EvalRecord] = field(default_factory=list)
    own_tokens: list[tuple[int, int]] = field(default_factory=list)  # this rank's (all, supervised) by step
    worker: Worker | None = None
    skipped_in_a_row: int = 0
    first_read: int = 0  # steps that were read together with the first one

    @property
    def step(self) -> int:
        return self.steps[-1].step if self.steps else 0

    @property
    def steady(self) -> slice:
        """All steps but the first, which warms allocators and libraries, and those that were read together with it
        (train.log_every); all where there are no others."""
        return slice(self.first_read if len(self.steps) > self.first_read else 0, None)


def run(request: Request, progress: Progress) -> Iterator[Event]:
    """Train as the request says. `progress` is filled as the run goes, for whoever has to report a failure.

    Raises the errors of launcher/errors.py; the folder, once there, then holds everything up to the last good step.
    """
    clock, recipe = Clock(), request.recipe
    yield "reading data"
    with clock.phase("data"):
        prepared = prepare_inputs(request)
    yield "starting processes"
    with clock.phase("start"):
        worker = progress.worker = Worker(request, prepared, clock=clock)
        worker.open_folder()
    yield "loading model"
    with clock.phase("load"):
        worker.build()
    yield "compiling"
    with clock.phase("compile"):
        worker.compile()
    yield start_record(worker)
    yield from _train(worker, progress)
    yield "saving adapter"
    with clock.phase("save"):
        saved = _save(worker)
    with clock.phase("sample"):
        sample = _sample(worker)
    step_s = [step.step_s for step in progress.steps]
    steady = progress.steady
    ranks = tuple(gather(rank_record(worker, step_s=step_s[steady], tokens=progress.own_tokens[steady])))
    record = RunRecord(
        recipe=recipe.model_dump(mode="json"),
        start=start_record(worker),
        steps=tuple(progress.steps),
        evals=tuple(progress.evals),
        elapsed_s=clock.elapsed_s,
        ranks=ranks,
        verdicts=tuple(_verdicts(worker, progress, ranks, saved)),
        data=dict(prepared.data.counts),
        sample=sample,
    )
    if worker.rank_info.is_main:
        worker.folder.report(record)
    worker.accelerator.end_training()
    worker.plan.release()
    yield record
    if not saved.holds:
        raise CheckpointError(saved.evidence)
    broken = [v for v in record.verdicts if not v.holds]
    if broken and recipe.compile.mode == "strict":
        raise ContractError("; ".join(f"{v.claim}: {v.evidence}" for v in broken))


def _train(worker: Worker, progress: Progress) -> Iterator[StepRecord | EvalRecord]:
    recipe, clock = worker.recipe.train, worker.clock
    yield from _evaluate(worker, progress, step=0)
    pending = MetricsReader()
    for number in range(1, worker.steps + 1):
        last = number == worker.steps
        evaluates = last or bool(recipe.eval_every and number % recipe.eval_every == 0)
        with clock.phase("train"):
            try:
                raise_if_stopped()
                batch = next(worker.batches)  # while the device works on the step before
                pending.add(worker.step(batch), batch)
            except (LauncherError, KeyboardInterrupt):
                _records(worker, progress, pending.read(all=True))  # the steps before it are good
                raise
            if not evaluates and number % recipe.log_every:
                continue
            records = _records(worker, progress, pending.read(all=evaluates))
            worker.plan.check()
        yield from records
        if evaluates:
            yield from _evaluate(worker, progress, step=number)
            pending.restart()
    worker.ledger.mark("after training")


def _records(worker: Worker, progress: Progress, readings: Sequence[StepMetrics]) -> list[StepRecord]:
    """Note and log what was read. Raises NonFiniteError naming the first step whose loss or gradient is not finite."""
    progress.first_read = progress.first_read or len(readings)
    records = []
    for reading in readings:
        batch = reading.batch
        record = StepRecord(
            step=progress.step + 1,
            loss=reading.loss_sum / max(1, batch.supervised_tokens),
            lr=reading.lr,
            grad_norm=reading.grad_norm,
            tokens=batch.tokens,
            supervised_tokens=batch.supervised_tokens,
            step_s=reading.step_s,
            vram_mib=worker.ledger.used_mib(),
            skipped=reading.skipped,
        )
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if record.skipped else 0
        _check_finite(record, progress.skipped_in_a_row)
        progress.steps.append(record)
        own = [(m.tokens, m.supervised_tokens) for m in batch.micro_batches]
        progress.own_tokens.append((sum(t for t, _ in own), sum(s for _, s in own)))
        _log(worker, record, {"loss": record.loss, "lr": record.lr, "grad_norm": record.grad_norm})
        records.append(record)
    return records


def _check_finite(record: StepRecord, skipped_in_a_row: int) -> None:
    if math.isfinite(record.loss) and (math.isfinite(record.grad_norm) or record.skipped):
        if skipped_in_a_row < SKIPS_IN_A_ROW:
            return
        what = f"{skipped_in_a_row} fp16 steps in a row overflowed"
    else:
        what = f"loss {record.loss}, gradient norm {record.grad_norm}"
    raise NonFiniteError(
        f"loss and gradients must be finite; step {record.step} has {what}. Its update was not applied.\n"
        "Lower train.lr, look at the data of that step, or use model.dtype=bfloat16 or float32.",
        step=record.step,
    )


def _evaluate(worker: Worker, progress: Progress, *, step: int) -> Iterator[EvalRecord]:
    if not worker.eval_batches:
        return
    with worker.clock.phase("evaluate"), torch.no_grad():
        sums = torch.zeros(2, dtype=torch.float64, device=worker.accelerator.device)
        for batch in worker.eval_batches:
            sums[0] += worker.plan.call(worker.step.eval_loss, batch)
            sums[1] += batch.supervised_tokens
        total, supervised = worker.accelerator.reduce(sums, reduction="sum").tolist()
    record = EvalRecord(step, total / max(1.0, supervised))
    if not math.isfinite(record.eval_loss):
        raise NonFiniteError(f"eval loss must be finite; after step {step} it is {record.eval_loss}.", step=step)
    progress.evals.append(record)
    worker.state.early_stop.update(record.eval_loss)
    _log(worker, record, {"eval_loss": record.eval_loss})
    yield record


def _log(worker: Worker, record: StepRecord | EvalRecord, values: dict[str, float]) -> None:
    if worker.rank_info.is_main:
        worker.folder.metric(record)
    if worker.recipe.run.trackers:
        worker.accelerator.log(values, step=record.step)


def _save(worker: Worker) -> Verdict:
    """Save on rank 0, prove the files, and only then give them their name; all ranks get the verdict."""
    verdict = None
    if worker.rank_info.is_main:
        folder, model, probe = worker.folder, worker.built.peft, worker.probe
        save_adapter(model, worker.prepared.tokenizer, folder.adapter_staging)
        try:
            before, after = prove_adapter(model, folder.adapter_staging, loss=lambda: _probe_loss(worker, probe))
            said = f"loss {before:.6f} trained, {after:.6f} reloaded from disk"
            verdict = Verdict("saved adapter reloads", True, said)
            folder.adapter_staging.rename(folder.adapter)
        except CheckpointError as error:
            verdict = Verdict("saved adapter reloads", False, str(error))
    return cast(Verdict, broadcast(verdict))


def _probe_loss(worker: Worker, probe: MicroBatch) -> float:
    return float(worker.plan.call(worker.step.eval_loss, probe)) / max(1, probe.supervised_tokens)


def _sample(worker: Worker) -> Any:
    example, tokens = worker.prepared.data.example, worker.recipe.run.sample_tokens
    if not (worker.rank_info.is_main and example and tokens):
        return None
    return generate(
        worker.built.packed,
        worker.prepared.tokenizer,
        example,
        tokens=tokens,
        max_length=worker.recipe.data.max_length,
    )


def _verdicts(worker: Worker, progress: Progress, ranks: Any, saved: Verdict) -> list[Verdict]:
    compiled = [] if worker.recipe.compile.mode == "off" else compile_verdicts(ranks)
    return [*compiled, loss_verdict(progress.steps, progress.evals), saved]
