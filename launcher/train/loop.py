"""The run: a generator of events on every rank. It knows no console, file of metrics, tracker or exit code: those are
sinks of its events (api.py). Only the adapter is saved here, since its proof needs the model.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace

from launcher.checkpoint.parts import write_parts
from launcher.data.read.rows import ReadingProgress
from launcher.errors import CheckpointError, ContractError, LauncherError
from launcher.records.run import Event, Phase, RunOpened
from launcher.runtime.clock import Clock
from launcher.runtime.failures import is_out_of_memory
from launcher.runtime.ranks import gather
from launcher.runtime.signals import deferring, stop_vote, voted_stop
from launcher.train.checkpoints import Checkpoints
from launcher.train.describe import start_record, with_base_notes
from launcher.train.evaluation import evaluate
from launcher.train.finish import make_sample, restore_best, run_record, save_adapter_proven, why_no_sample
from launcher.train.history import RunHistory, step_records
from launcher.train.inputs import prepare_inputs
from launcher.train.metrics import MetricsReader
from launcher.train.request import Request
from launcher.train.schedule_free import end_with_averages
from launcher.train.setup import Worker
from launcher.train.start import is_proved, prove_start


def training(request: Request, history: RunHistory) -> Generator[Event, None, None]:
    """Train as the request says; yields events in the order of records/run.py and fills `history`.

    Raises the errors of launcher/errors.py, after the events of all good steps.
    """
    try:
        yield from training_in_folder(request, history)
    finally:
        history.give_back_folder()


def training_in_folder(request: Request, history: RunHistory) -> Generator[Event, None, None]:
    """As `training`, but the run folder stays this process's until `history.give_back_folder()`: for who has something
    to write into it afterwards, as how the run ended."""
    try:
        yield from _run(request, history)
    finally:
        if history.worker is not None:
            history.worker.release()


def _run(request: Request, history: RunHistory) -> Iterator[Event]:
    clock, recipe, progress = Clock(request.started_s), request.recipe, ReadingProgress()
    yield Phase("reading data", progress)
    with clock.phase("data"):
        prepared = prepare_inputs(request, progress)
    yield "starting processes"
    with clock.phase("start"):
        worker = history.worker = Worker(request, prepared, clock=clock)
        worker.open_folder()
        resumed = worker.resumed
    yield RunOpened(worker.folder.path, step=resumed.step if resumed else 0)
    yield "loading model"
    with clock.phase("load"):
        worker.build()
    if is_proved(worker):
        yield "comparing with stock code"
        with clock.phase("start check"):
            prove_start(worker)
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
    end_with_averages(worker.step.optimizer)
    restored = restore_best(worker, history) if recipe.train.keep_best else None
    yield "saving adapter"
    with clock.phase("save"):
        saved = save_adapter_proven(worker)
    if not (no_sample := why_no_sample(worker)):
        yield "generating the sample"
    with clock.phase("sample"):
        sample = None if no_sample else make_sample(worker)
    verdicts = [*([restored] if restored else []), saved]
    record = replace(run_record(worker, history, verdicts), sample=sample, no_sample=no_sample)
    record = replace(record, parts=checkpoints.parts_until(worker.state.step))
    worker.accelerator.end_training()
    yield record
    if worker.rank_info.is_main:
        write_parts(worker.folder, record.parts)
    if not saved.holds:
        raise CheckpointError(saved.evidence)
    broken = [v for v in record.verdicts if not v.holds]
    if broken and recipe.compile.mode == "strict":
        raise ContractError("; ".join(f"{v.claim}: {v.evidence}" for v in broken))


def _train(worker: Worker, history: RunHistory, checkpoints: Checkpoints) -> Iterator[Event]:
    """A signal is deferred to the end of a step, whose state is then saved."""
    train, state = worker.recipe.train, worker.state
    if not state.step or history.lacks_evaluation(every=train.eval_every, last=worker.steps):
        yield from evaluate(worker, history, step=state.step)
    pending = MetricsReader()
    with deferring():
        for number in range(state.step + 1, worker.steps + 1):
            if state.early_stop.reached(train.patience):
                break
            yield from _train_step(worker, history, pending)
            evaluates = number == worker.steps or bool(train.eval_every and number % train.eval_every == 0)
            saves = checkpoints.due(number)
            if not (evaluates or saves) and number % train.log_every:
                continue
            with worker.clock.phase("train"):
                readings = pending.read(all=evaluates or saves)
            yield from step_records(worker, history, readings)
            worker.plan.check()
            if evaluates:
                cut_short = yield from evaluate(worker, history, step=number)
                saves |= train.keep_best and history.last_eval_is_best
            stop = voted_stop([cut_short if evaluates else 0.0, *(reading.stop_votes for reading in readings)])
            if stop:
                yield from step_records(worker, history, pending.read(all=True))
            if saves or stop:
                checkpoints.save(history.eval_losses)
            if stop:
                raise stop(checkpoints.finish())
            if evaluates or saves:
                pending.restart()
        checkpoints.save(history.eval_losses)  # so that a run with more steps can go on from it
        saved = checkpoints.finish()
        if stop := voted_stop(gather(stop_vote())):  # received after the last vote
            raise stop(saved)
    worker.ledger.mark("after training")


def _train_step(worker: Worker, history: RunHistory, pending: MetricsReader) -> Iterator[Event]:
    """Enqueue one step. If that fails, the records of the steps before it, which are good."""
    try:
        with worker.clock.phase("train"):
            worker.step.stop_vote = stop_vote()
            batch = next(worker.batches)  # while the device works on the step before
            pending.add(worker.step(batch), batch)
    except (LauncherError, KeyboardInterrupt, RuntimeError, MemoryError) as error:
        # A RuntimeError of another kind may come from the device, from which nothing more can be read.
        if not isinstance(error, RuntimeError) or is_out_of_memory(error):
            yield from step_records(worker, history, pending.read(all=True))
        raise
