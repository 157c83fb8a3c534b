"""Training from Python, as in a notebook. The command line trains through the same functions.

from launcher.api import run
record = run("tiny", "train.steps=5")
record.evals[-1].eval_loss, record.start.run_dir
"""

import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from rich.console import Console

from launcher.checkpoint.folder import RunFiles, check_report_path
from launcher.compile.inductor_cache import prepare_cache
from launcher.errors import RecipeError
from launcher.recipe.field_types import recipes_dir
from launcher.recipe.load import Resolved, resolve
from launcher.recipe.locate import config_file, locate
from launcher.records.run import Event, RunRecord
from launcher.report import Screen, make_console
from launcher.report.trackers import make_trackers
from launcher.runtime.clock import boot_clock_s, seconds_since
from launcher.runtime.environment import prepare_environment, quick_imports
from launcher.runtime.failures import classified, code_and_reason
from launcher.runtime.launch_flags import check_launch_flags
from launcher.runtime.ranks import RankInfo, end_with_parent, rank_info
from launcher.runtime.signals import listening
from launcher.train.before_torch import check_inputs, check_run_folder
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
    request = replace(make_request(resolved, info), started_s=started_s)
    with listening():
        return train(request, make_console(io.StringIO() if quiet else None), report_copy=resolved.report)


def make_request(resolved: Resolved, info: RankInfo) -> Request:
    """Settle the process's environment and locate the model. Raises RecipeError where that is not there or cannot be
    trained, where Accelerate was asked for what contradicts the recipe, or where report=PATH cannot be written,
    DataError where local data is not there; all before torch."""
    end_with_parent()
    check_report_path(resolved.report)
    prepare_environment()
    recipe, shipped = resolved.recipe, recipes_dir()
    notes = check_launch_flags(recipe.model, recipe.train, cores=info.cores)
    cache_note = prepare_cache(workers=info.cores)
    source = locate(recipe.model, shipped / "architectures")
    check_inputs(recipe, config_file(source, recipe.model.revision))
    return Request(recipe, resolved.name, source, shipped, info, notes=(*notes, *([cache_note] if cache_note else [])))


def train(request: Request, console: Console, *, report_copy: Path | None) -> RunRecord:
    """Run `request`; every event goes to the files, the trackers and `console`. status.json says how the run ended.

    `report_copy` is where else the report is written. Raises the errors of launcher/errors.py.
    """
    info = request.rank_info
    check_run_folder(request.recipe, request.name)
    files, trackers = RunFiles(info.rank, report_copy=report_copy), make_trackers(request.recipe.run.trackers)
    with Screen(console, clock=seconds_since(request.started_s)) as screen:
        screen.show("importing torch")
        with quick_imports():
            import launcher.train.loop  # noqa: F401
        record = _train(request, files, [files, *(trackers if info.is_main else []), screen])
        files.end(code=0, reason="done" + ("; the console was closed on the way" if screen.lost else ""))
        return record


def _train(request: Request, files: RunFiles, sinks: Sequence[Sink]) -> RunRecord:
    """A function of its own: what exists while imports are frozen, a cell of `history` too, would never be freed."""
    from launcher.train import loop
    from launcher.train.history import RunHistory

    history = RunHistory()
    try:
        with classified(request.rank_info, lambda: history.ledger):
            for event in loop.training(request, history):
                for sink in sinks:
                    sink.show(event)
    except BaseException as failure:
        code, reason = code_and_reason(failure)
        with suppress(OSError):  # a full disk must not hide what ended the run
            files.end(code=code, reason=reason, step=getattr(failure, "step", None))
        raise
    assert isinstance(event, RunRecord), "a run's last event is its record"
    return event
