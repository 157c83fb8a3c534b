"""The run: a generator of events on every rank. It knows no console, file of metrics, tracker or exit code: those are
sinks of its events (api.py). Only the adapter is saved here, since its proof needs the model.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import cast

import torch

from launcher.checkpoint.adapter import save_proven
from launcher.checkpoint.resume import Resumed
from launcher.errors import CheckpointError, ContractError, LauncherError, NonFiniteError
from launcher.records.run import (
    EvalRecord,
    Event,
    Phase,
    RankRecord,
    RunOpened,
    RunRecord,
    Sample,
    StepRecord,
    Verdict,
)
from launcher.runtime.clock import Clock
from launcher.runtime.ranks import broadcast, gather
from launcher.runtime.signals import deferring, stop_vote, voted_stop
from launcher.train.checkpoints import Checkpoints
from launcher.train.describe import rank_record, start_record
from launcher.train.inputs import prepare_inputs
from launcher.train.metrics import MetricsReader, StepMetrics
from launcher.train.request import Request
from launcher.train.sample import generate
from launcher.train.setup import Worker
from launcher.train.verdicts import compile_verdicts

SKIPS_IN_A_ROW = 20  # fp16: a scale that halves this often without one good step will not recover


@dataclass
class RunHistory:
    """What the run has done so far, filled as it goes: also for whoever reports a failure."""

    steps: list[StepRecord] = field(default_factory=list)  # those of earlier parts of the run too
    evals: list[EvalRecord] = field(default_factory=list)
    rank_tokens: list[tuple[int, int]] = field(default_factory=list)  # this rank's (all, supervised), by step
    worker: Worker | None = None
    last_step: int = 0
    skipped_in_a_row: int = 0
    first_read: int = 0  # steps of this part that were read together with the first one

    def go_on(self, resumed: Resumed) -> None:
        """Take over the records of the run's earlier parts."""
        self.steps = [record for record in resumed.records if isinstance(record, StepRecord)]
        self.evals = [record for record in resumed.records if isinstance(record, EvalRecord)]
        self.last_step = resumed.step
        self.skipped_in_a_row = len(list(takewhile(lambda step: step.skipped, reversed(self.steps))))

    @property
    def ledger(self) -> str:
        """What holds memory, by phase."""
        return self.worker.ledger.as_text() if self.worker else "nothing yet"

    @property
    def steady(self) -> tuple[list[float], list[tuple[int, int]]]:
        """Seconds and this rank's tokens of all steps of this part but the first, which warms allocators and libraries,
        and those that were read together with it (train.log_every); of all where there are no others."""
        count = len(self.rank_tokens)
        steady = count - self.first_read if count > self.first_read else count
        start = count - steady
        return [step.step_s for step in self.steps[len(self.steps) - steady :]], self.rank_tokens[start:]


def training(request: Request, history: RunHistory) -> Iterator[Event]:
    """Train as the request says; yields events in the order of records/run.py and fills `history`.

    Raises the errors of launcher/errors.py, after the events of all good steps.
    """
    try:
        yield from _run(request, history)
    finally:
        if history.worker is not None:
            history.worker.release()


def _run(request: Request, history: RunHistory) -> Iterator[Event]:
    clock, recipe = Clock(request.started_s), request.recipe
    yield "reading data"
    with clock.phase("data"):
        prepared = prepare_inputs(request)
    yield "starting processes"
    with clock.phase("start"):
        worker = history.worker = Worker(request, prepared, clock=clock)
        worker.open_folder()
        resumed = worker.resumed
    yield RunOpened(worker.folder.path, step=resumed.step if resumed else 0)
    yield "loading model"
    with clock.phase("load"):
        worker.build()
    yield Phase("compiling", worker.compile_progress)
    with clock.phase("compile"):
        worker.compile()
        if resumed:
            worker.state.load_state_dict(resumed.state["state"])
            history.go_on(resumed)
    checkpoints = Checkpoints(worker, resumed)
    if resumed:
        worker.resumed = resumed = replace(resumed, state={})  # as large as the optimizer
    with closing(checkpoints):
        yield start_record(worker)
        yield from _train(worker, history, checkpoints)
    yield "saving adapter"
    with clock.phase("save"):
        saved = _save(worker)
    if not (no_sample := _why_no_sample(worker)):
        yield "generating the sample"
    with clock.phase("sample"):
        sample = None if no_sample else _sample(worker)
    record = replace(_run_record(worker, history, saved), sample=sample, no_sample=no_sample)
    record = replace(record, parts=checkpoints.parts_until(worker.state.step))
    worker.accelerator.end_training()
    yield record
    if not saved.holds:
        raise CheckpointError(saved.evidence)
    broken = [v for v in record.verdicts if not v.holds]
    if broken and recipe.compile.mode == "strict":
        raise ContractError("; ".join(f"{v.claim}: {v.evidence}" for v in broken))


def _train(worker: Worker, history: RunHistory, checkpoints: Checkpoints) -> Iterator[StepRecord | EvalRecord]:
    """A signal is deferred to the end of a step, whose state is then saved."""
    if not worker.state.step:
        yield from _evaluate(worker, history, step=0)
    pending = MetricsReader()
    with deferring():
        for number in range(worker.state.step + 1, worker.steps + 1):
            yield from _train_step(worker, history, pending)
            evaluates = number == worker.steps or bool(
                worker.recipe.train.eval_every and number % worker.recipe.train.eval_every == 0
            )
            saves = checkpoints.due(number)
            if not (evaluates or saves) and number % worker.recipe.train.log_every:
                continue
            with worker.clock.phase("train"):
                readings = pending.read(all=evaluates or saves)
            yield from _step_records(worker, history, readings)
            worker.plan.check()
            if evaluates:
                yield from _evaluate(worker, history, step=number)
            stop = voted_stop(reading.stop_votes for reading in readings)
            if stop:
                yield from _step_records(worker, history, pending.read(all=True))
            if saves or stop:
                checkpoints.save()
            if stop:
                raise stop(checkpoints.finish())
            if evaluates or saves:
                pending.restart()
        checkpoints.save()  # so that a run with more steps can go on from it
        saved = checkpoints.finish()
        if stop := voted_stop(gather(stop_vote())):  # received after the last vote
            raise stop(saved)
    worker.ledger.mark("after training")


def _train_step(worker: Worker, history: RunHistory, pending: MetricsReader) -> Iterator[StepRecord]:
    """Enqueue one step. If that fails, the records of the steps before it, which are good."""
    try:
        with worker.clock.phase("train"):
            worker.step.stop_vote = stop_vote()
            batch = next(worker.batches)  # while the device works on the step before
            pending.add(worker.step(batch), batch)
    except (LauncherError, KeyboardInterrupt):
        yield from _step_records(worker, history, pending.read(all=True))
        raise


def _step_records(worker: Worker, history: RunHistory, readings: Sequence[StepMetrics]) -> Iterator[StepRecord]:
    """Raises NonFiniteError naming the first step whose loss or gradient is not finite, after the records before it."""
    history.first_read = history.first_read or len(readings)
    for reading in readings:
        batch = reading.batch
        record = StepRecord(
            step=history.last_step + 1,
            loss=reading.loss_sum / max(1, batch.supervised_tokens),
            lr=reading.lr,
            grad_norm=reading.grad_norm,
            tokens=batch.tokens,
            supervised_tokens=batch.supervised_tokens,
            step_s=reading.step_s,
            vram_mib=worker.ledger.used_mib(),
            skipped=reading.skipped,
        )
        history.skipped_in_a_row = history.skipped_in_a_row + 1 if record.skipped else 0
        _check_finite(record, history.skipped_in_a_row)
        history.steps.append(record)
        history.last_step = record.step
        micro_batches = batch.micro_batches
        history.rank_tokens.append(
            (sum(m.tokens for m in micro_batches), sum(m.supervised_tokens for m in micro_batches))
        )
        yield record


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


def _evaluate(worker: Worker, history: RunHistory, *, step: int) -> Iterator[EvalRecord]:
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
    history.evals.append(record)
    worker.state.early_stop.update(record.eval_loss)
    yield record


def _save(worker: Worker) -> Verdict:
    """Save and prove the adapter on rank 0; every rank gets the verdict."""
    verdict = None
    if worker.rank_info.is_main:
        verdict = save_proven(
            worker.built.peft, worker.prepared.tokenizer, worker.folder, loss=lambda: _probe_loss(worker)
        )
    return cast(Verdict, broadcast(verdict))


def _probe_loss(worker: Worker) -> float:
    probe = worker.probe
    return float(worker.plan.call(worker.step.eval_loss, probe)) / max(1, probe.supervised_tokens)


def _why_no_sample(worker: Worker) -> str:
    """Why the run has no sample; "" where it has one."""
    data = worker.prepared.data
    if not worker.recipe.run.sample_tokens:
        return "run.sample_tokens=0"
    if not data.validation_rows:
        return "no row validates (data.validation)"
    if data.example is None:
        return "no validation row is a chat that ends in an answer, with a question shorter than data.max_length"
    return ""


def _sample(worker: Worker) -> Sample | None:
    example, recipe = worker.prepared.data.example, worker.recipe
    if not (worker.rank_info.is_main and example):
        return None
    return generate(
        worker.built.packed,
        worker.prepared.tokenizer,
        example,
        tokens=recipe.run.sample_tokens,
        max_length=recipe.data.max_length,
    )


def _run_record(worker: Worker, history: RunHistory, saved: Verdict) -> RunRecord:
    step_s, tokens = history.steady
    ranks: tuple[RankRecord, ...] = tuple(gather(rank_record(worker, step_s=step_s, tokens=tokens)))
    compiled = (
        []
        if worker.recipe.compile.mode == "off"
        else compile_verdicts([rank.compile for rank in ranks], steps=len(history.rank_tokens))
    )
    return RunRecord(
        recipe=worker.recipe.model_dump(mode="json"),
        start=start_record(worker),
        steps=tuple(history.steps),
        evals=tuple(history.evals),
        elapsed_s=worker.clock.elapsed_s,
        ranks=ranks,
        verdicts=(*worker.built.loaded, *compiled, saved),
        data=dict(worker.prepared.data.counts),
        adapter=str(worker.folder.adapter) if saved.holds and worker.recipe.model.init != "random" else None,
    )
