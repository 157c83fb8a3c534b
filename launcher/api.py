"""Training from Python, as in a notebook. The command line trains through the same functions.

from launcher.api import run
record = run("tiny", "train.steps=5")
record.evals[-1].eval_loss, record.start.run_dir
"""

import gc
import io
import signal
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from rich.console import Console

from launcher.checkpoint.folder import RunFiles
from launcher.compile.inductor_cache import prepare_cache
from launcher.errors import RecipeError
from launcher.preflight.before_torch import check_before_torch
from launcher.preflight.lines import Checks
from launcher.recipe.field_types import interval_s, recipes_dir
from launcher.recipe.load import Resolved, resolve
from launcher.records.run import Event, Note, RunRecord
from launcher.report import Screen, make_console
from launcher.report import error as print_error
from launcher.report.trackers import Trackers, make_trackers
from launcher.runtime.clock import boot_clock_s, seconds_since
from launcher.runtime.ending import last_words
from launcher.runtime.environment import prepare_environment, quick_imports
from launcher.runtime.failures import classified, code_and_reason
from launcher.runtime.heartbeat import Heartbeat
from launcher.runtime.parent import end_with_parent, under_launcher
from launcher.runtime.ranks import RankInfo, rank_info
from launcher.runtime.signals import deferring, listening
from launcher.runtime.watched_ranks import Ending
from launcher.train.request import Request


class Sink(Protocol):
    """Something that a run's events are shown to, each as it comes: the console, files, a tracker."""

    def show(self, event: Event) -> None: ...


def run(recipe: str, *overrides: str, quiet: bool = False) -> RunRecord:
    """Train, as the command line does with `recipe=RECIPE OVERRIDE ...`; returns what report.json is written from.

    `recipe` is the name of a shipped recipe or a path that ends in .yaml, an override is a text like "train.steps=5".
    The run folder is the same as the command line's, and so is what is printed, unless `quiet`.

    Raises:
        LauncherError: the run failed; its class and `code` say how (launcher/errors.py).
    """
    started_s = boot_clock_s()
    resolved, info = resolve([f"recipe={recipe}", *overrides]), rank_info()
    if resolved.mode != "train":
        raise RecipeError(f"run() trains; got mode={resolved.mode}; give that to the command line: qlora-launcher")
    if info.world_size > 1:  # a run ends its process group, and a second run of the process would find none
        raise RecipeError(f"run() trains in one process; {info.world_size} were started; launch launcher/main.py")
    request = replace(make_request(resolved, info, trains=True), started_s=started_s)
    with listening():
        try:
            return train(request, make_console(io.StringIO() if quiet else None), report_copy=resolved.report)
        finally:
            gc.collect()  # the model is part of cycles; its memory is the next run's


def make_request(resolved: Resolved, info: RankInfo, *, trains: bool = False) -> Request:
    """Settle the process's environment and locate the model. Raises, as one error, whatever can be told before torch is
    imported to be wrong with packages, launch, model, data, report=PATH and, if it `trains`, the run folder."""
    notes = [*prepare_environment(), prepare_cache(workers=info.cores)]
    checks, shipped = Checks(), recipes_dir()
    located = check_before_torch(checks, resolved, shipped=shipped, cores=info.cores, trains=trains)
    checks.refuse()
    assert located.source is not None, "else it was refused"
    notes += located.notes
    return Request(resolved.recipe, resolved.name, located.source, shipped, info, notes=tuple(filter(None, notes)))


def train(request: Request, console: Console, *, report_copy: Path | None) -> RunRecord:
    """Run `request`; every event goes to the files, the trackers and `console`. status.json says how the run ended.

    `report_copy` is where else the report is written. Raises the errors of launcher/errors.py.
    """
    info = request.rank_info
    files, recipe = RunFiles(info.rank, report_copy=report_copy), request.recipe
    config = {"recipe": request.name, **recipe.model_dump(mode="json")}
    trackers = make_trackers(recipe.run.trackers, config, is_main=info.is_main)
    with Screen(console, clock=seconds_since(request.started_s)) as screen, last_words(lambda *_: screen.close()):
        screen.show("importing torch")
        with quick_imports():
            import launcher.preflight.with_torch
            import launcher.train.loop  # noqa: F401
        end_with_parent(signal.SIGTERM)  # from now on there may be something to save
        try:
            record = _train(request, files, [files, trackers, screen], trackers)
        finally:
            with deferring():
                late = trackers.close()
            for text in late:
                screen.show(Note(text))
        if late:
            record = replace(record, notes=(*record.notes, *late))
            files.show(record)
        files.end(code=0, reason="done" + ("; the console was closed on the way" if screen.lost else ""))
        return record


def _train(request: Request, files: RunFiles, sinks: Sequence[Sink], trackers: Trackers) -> RunRecord:
    """A function of its own: what exists while imports are frozen, a cell of `history` too, would never be freed."""
    from launcher.preflight.with_torch import check_before_load
    from launcher.train import loop
    from launcher.train.history import RunHistory
    from launcher.train.rescue import rescue

    history = RunHistory()
    heartbeat = Heartbeat(
        request.rank_info,
        timeout_s=interval_s(request.recipe.run.timeout),
        on_lost=partial(_record_loss, files, request.rank_info),
        saving=lambda: files.saving,
    )
    try:
        with (
            last_words(lambda code, reason: files.end(code=code, reason=reason)),
            classified(request.rank_info, lambda: history.ledger),
            closing(loop.training(request, history)) as events,
        ):
            check_before_load(request)
            for event in trackers.noting(events):
                for sink in (sinks[0], heartbeat, *sinks[1:]):
                    sink.show(event)
    except BaseException as failure:
        with deferring():  # the process launcher terminates this rank because another has ended
            try:
                rescue(history.worker, failure)
            except Exception as error:  # must not take the place of the failure
                failure.add_note(f"The adapter could not be kept: {type(error).__name__}: {error}")
            cause = heartbeat.first_cause(failure)
            code, reason = code_and_reason(cause)
            with suppress(OSError):  # a full disk must not hide what ended the run
                files.end(
                    code=code, reason=reason, step=getattr(cause, "step", None), rank=getattr(cause, "rank", None)
                )
        if cause is failure:
            raise
        raise cause from failure
    finally:
        with deferring():
            heartbeat.close()
    assert isinstance(event, RunRecord), "a run's last event is its record"
    return event


def _record_loss(files: RunFiles, info: RankInfo, ending: Ending, told: bool) -> None:
    """Before another rank's end ends this process, which may happen without a further word. One rank prints it: the one
    that tells its own end, or the first that found another's; for a rank of another machine rank 0 too."""
    written = True
    with suppress(OSError, ValueError):  # the folder may be on another machine
        written = files.end(code=ending.code, reason=ending.reason, step=ending.step, rank=ending.rank)
    console = make_console(sys.stderr)
    if (info.is_main and ending.rank >= info.local_world_size) if told else written:
        print_error(console, ending.reason, ending.code, framed=under_launcher())
    console.show_cursor()  # the live line hides it
