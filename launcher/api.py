"""Training from Python, as in a notebook: launcher.run and launcher.events. The command line trains through the same
functions.

run ─► events ─► _handed_over ─► _run_events ─► _train ──► _watched ─► train/loop.py
       one a     signals and     imports        trackers,  sinks, status.json,
       process   memory                         closing    who leaves
"""

import gc
import io
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.checkpoint.run_files import RunFiles
from launcher.compile.inductor_cache import prepare_cache
from launcher.errors import RecipeError
from launcher.export.card import run_card
from launcher.preflight.before_torch import check_before_torch
from launcher.preflight.lines import Checks
from launcher.recipe.field_types import interval_s, recipes_dir
from launcher.recipe.load import Resolved, resolve
from launcher.records.run import Event, Note, RunRecord
from launcher.report import Screen, make_console
from launcher.report.console import kernel_shell
from launcher.report.html_page import html_of
from launcher.report.notebook import NotebookScreen
from launcher.report.trackers import Trackers, make_trackers
from launcher.run_end import record_failure, record_loss
from launcher.runtime.clock import boot_clock_s, seconds_since
from launcher.runtime.ending import last_words
from launcher.runtime.environment import environment_put_back, prepare_environment, quick_imports
from launcher.runtime.failures import classified, free_frames
from launcher.runtime.heartbeat import Heartbeat
from launcher.runtime.packages import computing_versions
from launcher.runtime.parent import end_with_parent
from launcher.runtime.ranks import RankInfo, rank_info
from launcher.runtime.signals import ask_to_stop, deferring, forget_signals, handling, listening
from launcher.sinks import GuardedSink, Sink, closed_at_end, light
from launcher.train.request import Request
from launcher.trained_run import TrainedRun

_running: list[str] = []  # the recipe of the run of this process


def run(recipe: str, *overrides: str, sinks: Sequence[Sink] = (), quiet: bool = False) -> TrainedRun:
    """Train, as the command line does with `recipe=RECIPE OVERRIDE ...`; returns what report.json is written from.

    `recipe` is the name of a shipped recipe or a path that ends in .yaml, an override is a text like "train.steps=5".
    `sinks` are shown every event too. The run folder is the same as the command line's, and so is what is printed,
    unless `quiet`; a kernel's cell shows progress in one display.

    Raises:
        LauncherError: the run failed; its class and `code` say how (launcher/errors.py).
        KeyboardInterrupt: the training was interrupted, and saved; the same call goes on if it has a run.output_dir.
    """
    with listening():
        [record] = deque(events(recipe, *overrides, sinks=sinks, quiet=quiet), maxlen=1)
    assert isinstance(record, RunRecord), "a run's last event is its record"
    return TrainedRun(**vars(record))


def events(
    recipe: str, *overrides: str, sinks: Sequence[Sink] = (), quiet: bool = True
) -> Generator[Event, None, None]:
    """`run` as an iterator over its events, the last one a RunRecord; it begins with the first `next`. Who leaves it
    ends the run: it is saved first where steps are trained, as by an interrupt.

    Raises what `run` raises.
    """
    with closed_at_end(sinks):
        yield from _events(recipe, overrides, sinks, quiet=quiet)


def _events(
    recipe: str, overrides: Sequence[str], sinks: Sequence[Sink], *, quiet: bool
) -> Generator[Event, None, None]:
    started_s = boot_clock_s()
    resolved, info = resolve([f"recipe={recipe}", *overrides]), rank_info()
    if resolved.mode != "train":
        raise RecipeError(f"run() trains; got mode={resolved.mode}; give that to the command line: qlora-launcher")
    if info.world_size > 1:  # a run ends its process group, and a second run of the process would find none
        raise RecipeError(f"run() trains in one process; {info.world_size} were started; launch launcher/main.py")
    if _running:
        raise RecipeError(
            f"a process trains one model at a time; the run of {_running[0]} goes on. Iterate over its events to their "
            "end, or close() them."
        )
    _running.append(recipe)
    try:
        with environment_put_back() as prepared:
            request = replace(make_request(resolved, info, trains=True), started_s=started_s)
            prepared()
            screen = _screen(request, quiet=quiet)
            yield from _handed_over(_run_events(request, screen, report_copy=resolved.report, callers=sinks))
    finally:
        _running.clear()


def _screen(request: Request, *, quiet: bool) -> Screen | NotebookScreen:
    console, clock = make_console(io.StringIO() if quiet else None), seconds_since(request.started_s)
    shell = None if quiet else kernel_shell()
    return NotebookScreen(shell, console, clock=clock) if shell else Screen(console, clock=clock)


def _handed_over(events: Generator[Event, None, None]) -> Iterator[Event]:
    """The events of a run, between which the process is the caller's: its signals, and after them its memory."""
    forget_signals()
    try:
        while True:
            outer = sys.exception()
            try:
                with handling():
                    event = next(events, None)
            except BaseException as failure:
                free_frames(failure, but=outer)
                raise
            if event is None:
                return
            yield event
    finally:
        with handling():
            events.close()
        forget_signals()
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
    settled, given = tuple(filter(None, notes)), {key: of for key, of in resolved.origins.items() if of != "default"}
    return Request(resolved.recipe, resolved.name, located.source, shipped, info, notes=settled, origins=given)


def train(request: Request, console: Console, *, report_copy: Path | None) -> None:
    """Run `request`; every event goes to the files, the trackers and `console`. status.json says how the run ended.

    `report_copy` is where else the report is written. Raises the errors of launcher/errors.py.
    """
    for _ in _run_events(request, Screen(console, clock=seconds_since(request.started_s)), report_copy=report_copy):
        pass


def _run_events(
    request: Request, screen: Screen | NotebookScreen, *, report_copy: Path | None, callers: Sequence[Sink] = ()
) -> Generator[Event, None, None]:
    """`callers`: sinks of the caller, which may fail."""
    info, recipe = request.rank_info, request.recipe
    config = {"recipe": request.name, **recipe.model_dump(mode="json")}
    trackers = make_trackers(recipe.run.trackers, config, is_main=info.is_main)
    files = RunFiles(info.rank, report_copy=report_copy, card=_card, html=html_of)
    guarded = [GuardedSink(sink) for sink in callers]
    with screen, last_words(lambda *_: screen.close()):
        screen.show("importing torch")
        with quick_imports():
            import launcher.preflight.with_torch
            import launcher.train.loop  # noqa: F401
        end_with_parent(signal.SIGTERM)  # from now on there may be something to save
        yield from _train(request, files, screen, trackers, guarded)


def _card(record: RunRecord) -> str:
    return run_card(record.as_report())


def _train(
    request: Request,
    files: RunFiles,
    screen: Screen | NotebookScreen,
    trackers: Trackers,
    guarded: Sequence[GuardedSink],
) -> Generator[Event, None, None]:
    """A function of its own: what exists while imports are frozen, a cell of `history` too, would never be freed."""
    from launcher.train.history import RunHistory

    history = RunHistory()
    try:
        try:
            yield from _watched(request, history, files, screen, trackers, guarded)
        finally:
            with deferring():
                late = trackers.close()
            for text in late:
                screen.show(Note(text))
            files.add_notes(late)
    finally:
        history.give_back_folder()  # last: another run may take it at once, and writes the same files


def _watched(
    request: Request,
    history: Any,
    files: RunFiles,
    screen: Screen | NotebookScreen,
    trackers: Trackers,
    guarded: Sequence[GuardedSink],
) -> Generator[Event, None, None]:
    """The events of a run, each shown to all sinks; its failure, and how it ended, recorded."""
    from launcher.preflight.with_torch import check_before_load
    from launcher.train import loop

    left = False
    heartbeat = Heartbeat(
        request.rank_info,
        timeout_s=interval_s(request.recipe.run.timeout),
        on_lost=partial(record_loss, files, request.rank_info),
        saving=lambda: files.saving,
    )
    try:
        with (
            last_words(lambda code, reason: files.end(code=code, reason=reason)),
            classified(request.rank_info, lambda: history.ledger),
            closing(loop.training_in_folder(request, history)) as events,
        ):
            check_before_load(request)
            for event in trackers.noting(map(light, events)):
                if isinstance(event, RunRecord):
                    event = files.with_pages(replace(event, versions=computing_versions()))
                for sink in (files, heartbeat, trackers, screen, *guarded):
                    sink.show(event)
                try:
                    if not left:
                        yield event
                except GeneratorExit:  # the caller wants no more; what was trained is saved
                    left = isinstance(event, RunRecord) or ask_to_stop()
                    if not left:
                        raise
            for sink in guarded:
                if sink.failure:
                    raise sink.failure
    except BaseException as failure:
        with deferring():  # the process launcher terminates this rank because another has ended
            cause = record_failure(failure, request, history, heartbeat, files, guarded)
        if left and isinstance(cause, KeyboardInterrupt):
            return
        if cause is failure:
            raise
        raise cause from cause.__cause__ or failure
    finally:
        with deferring():
            heartbeat.close()
    files.end(code=0, reason="done" + ("; the console was closed on the way" if screen.lost else ""))
