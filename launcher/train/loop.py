"""The run: a generator of events on every rank. It knows no console, file of metrics, tracker or exit code: those are
sinks of its events (api.py). Only the adapter is saved here, since its proof needs the model.
"""

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import torch

from launcher.errors import CheckpointError, ContractError, LauncherError, NonFiniteError
from launcher.records.run import EvalRecord, Event, Phase, RunOpened, StepRecord
from launcher.runtime.clock import Clock
from launcher.runtime.ranks import gather
from launcher.runtime.signals import deferring, stop_vote, voted_stop
from launcher.train.checkpoints import Checkpoints
from launcher.train.describe import start_record, with_base_notes
from launcher.train.finish import make_sample, run_record, save_adapter_proven, why_no_sample
from launcher.train.history import RunHistory, step_records
from launcher.train.inputs import prepare_inputs
from launcher.train.metrics import MetricsReader
from launcher.train.request import Request
from launcher.train.setup import Worker


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
        yield from with_base_notes(_train(worker, history, checkpoints), worker)
    yield "saving adapter"
    with clock.phase("save"):
        saved = save_adapter_proven(worker)
    if not (no_sample := why_no_sample(worker)):
        yield "generating the sample"
    with clock.phase("sample"):
        sample = None if no_sample else make_sample(worker)
    record = replace(run_record(worker, history, saved), sample=sample, no_sample=no_sample)
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
            yield from step_records(worker, history, readings)
            worker.plan.check()
            if evaluates:
                yield from _evaluate(worker, history, step=number)
            stop = voted_stop(reading.stop_votes for reading in readings)
            if stop:
                yield from step_records(worker, history, pending.read(all=True))
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
        yield from step_records(worker, history, pending.read(all=True))
        raise


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
