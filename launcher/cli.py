"""The command line: resolve the recipe, run the mode, print, end with the right exit code (README, "Exit codes").

torch is imported only once the recipe is known to be good: a mistyped key answers at once.
"""

import errno
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

from rich.console import Console

from launcher.checkpoint.folder import write_json
from launcher.errors import LESS_MEMORY, ContractError, DiskError, LauncherError, LostRank, MemoryExhausted, RecipeError
from launcher.proof.bench.compare import bench
from launcher.proof.bench.processes import ChildFailed
from launcher.recipe.field_types import recipes_dir
from launcher.recipe.help import print_request
from launcher.recipe.load import Resolved, resolve
from launcher.recipe.locate import locate
from launcher.records.bench import BenchRecord
from launcher.records.parity import ParityRecord
from launcher.records.run import RunRecord
from launcher.report import Screen, make_console
from launcher.report import error as print_error
from launcher.runtime.quick_imports import quick_imports
from launcher.runtime.ranks import RankInfo, end_with_parent, rank_info
from launcher.runtime.signals import Terminated, listen
from launcher.train.request import Request

if TYPE_CHECKING:
    from launcher.train.loop import Progress

SHARED_CODES = (2, 3)  # every rank of a machine finds these alike, so one of them says it
CONNECTION = ("gloo/", "Connection closed by peer", "NCCL", "ProcessGroup")  # in what torch raises when a rank is gone


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code. Every failure meant for the user is a message, not a traceback."""
    here = rank_info()
    argv = list(sys.argv[1:] if argv is None else argv)
    listen()
    try:
        with open(os.devnull, "w") as nowhere:
            if print_request(argv, console=make_console(None if here.is_main else nowhere)):
                return 0
            resolved, console = resolve(argv), make_console(None if here.is_main else nowhere)
            modes = {"preview": _preview, "parity": _parity, "bench": _bench}
            return modes.get(resolved.mode, _train)(resolved, here, console)
    except LauncherError as error:
        _print_error(error, here)
        return error.code
    except (KeyboardInterrupt, Terminated) as stop:
        code, reason = _code_and_reason(stop)
        print_error(make_console(sys.stderr), f"rank {here.rank}: {reason}; nothing was saved", code)
        return code


def _prepared(resolved: Resolved, here: RankInfo) -> tuple[tuple[str, ...], Path, str]:
    """What every mode that reads data begins with: notes on the environment, the shipped recipes, the model's place."""
    from launcher.runtime.environment import prepare_environment

    end_with_parent()
    _check_report_path(resolved)
    notes, shipped = prepare_environment(here), recipes_dir()
    return notes, shipped, locate(resolved.recipe.model, shipped / "architectures")


def _train(resolved: Resolved, here: RankInfo, console: Console) -> int:
    notes, shipped, source = _prepared(resolved, here)
    with Screen(console) as screen:
        screen.show("importing torch")
        with quick_imports():
            from launcher.train.loop import Progress, run

        request, progress = Request(resolved.recipe, resolved.name, source, shipped, here, notes), Progress()
        try:
            for event in run(request, progress):
                screen.show(event)
                if isinstance(event, RunRecord) and resolved.report and here.is_main and progress.worker:
                    shutil.copyfile(progress.worker.folder.path / "report.json", resolved.report)
        except BaseException as error:
            _fail(error, progress, here)
        _status(progress, here, code=0, reason="done")
    return 0


def _preview(resolved: Resolved, here: RankInfo, console: Console) -> int:
    if not here.is_main:  # one process sees all there is to see
        return 0
    _, shipped, source = _prepared(resolved, here)  # the notes are about the compile cache, which serves no preview
    with Screen(console) as screen:
        screen.show("preparing the data")
        with quick_imports():
            from launcher.data.prepare import prepare
            from launcher.data.preview import preview_record
            from launcher.model.families import family_of
            from launcher.model.source import load_config, load_tokenizer

        recipe = resolved.recipe
        family_of(load_config(source, recipe.model), max_length=recipe.data.max_length)  # refuses what training refuses
        tokenizer = load_tokenizer(source, recipe.model, stand_in=shipped / "tiny" / "base")
        data = prepare(recipe.data, tokenizer, seed=recipe.train.seed)
        name, blocks = resolved.name, resolved.blocks
        screen.show(preview_record(data, tokenizer, recipe=recipe, name=name, source=source, blocks=blocks))
    return 0


def _parity(resolved: Resolved, here: RankInfo, console: Console) -> int:
    _check_alone(resolved, here)
    notes, shipped, source = _prepared(resolved, here)
    with Screen(console) as screen:
        screen.show("importing torch")
        with quick_imports():
            from launcher.proof.parity import parity
            from launcher.train.loop import Progress

        try:
            for event in parity(Request(resolved.recipe, resolved.name, source, shipped, here, notes)):
                screen.show(event)
            record = cast(ParityRecord, event)
            if resolved.report:
                write_json(resolved.report, record.as_report())
        except BaseException as error:
            _fail(error, Progress(), here)
    if not record.holds:
        raise ContractError(record.failure)
    return 0


def _bench(resolved: Resolved, here: RankInfo, console: Console) -> int:
    _check_alone(resolved, here)
    notes, shipped, source = _prepared(resolved, here)
    with Screen(console) as screen:
        for event in bench(Request(resolved.recipe, resolved.name, source, shipped, here, notes)):
            screen.show(event)
        record = cast(BenchRecord, event)
        try:
            if resolved.report:
                write_json(resolved.report, record.as_report())
        except OSError as error:
            from launcher.train.loop import Progress

            _fail(error, Progress(), here)
    if not record.holds:
        raise ContractError(record.failure)
    if record.naive and record.naive.failure and not record.naive.out_of_memory:
        raise ChildFailed(f"naive must come to its end to be compared; it did not: {record.naive.failure}.")
    return 0


def _check_alone(resolved: Resolved, here: RankInfo) -> None:
    if here.world_size > 1:
        raise RecipeError(
            f"mode={resolved.mode} runs in one process; {here.world_size} were started. "
            f"Run python launcher/main.py recipe={resolved.name} mode={resolved.mode}."
        )


def _fail(error: BaseException, progress: "Progress", here: RankInfo) -> NoReturn:
    """Turn any end but success into its error, leave status.json, and raise."""
    import torch

    worker = progress.worker
    if isinstance(error, torch.OutOfMemoryError):
        ledger = worker.ledger.as_text() if worker else "nothing yet"
        error = MemoryExhausted(
            f"the device ran out of memory on rank {here.rank}; held by phase: {ledger}.\n{LESS_MEMORY}"
        )
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        error = DiskError(
            f"the disk is full: {error.filename or 'a file of the run'} could not be written. Free space."
        )
    elif here.world_size > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in CONNECTION):
        error = LostRank("another rank ended first and closed the connection; its own error says why.")
    code, reason = _code_and_reason(error)
    with suppress(OSError):  # a full disk must not hide what ended the run
        _status(progress, here, code=code, reason=reason, step=getattr(error, "step", None))
    raise error


def _code_and_reason(error: BaseException) -> tuple[int, str]:
    if isinstance(error, LauncherError):
        return error.code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    if isinstance(error, Terminated):
        return 128 + signal.SIGTERM, "terminated"
    return 1, f"{type(error).__name__}: {error}"


def _status(progress: "Progress", here: RankInfo, *, code: int, reason: str, step: int | None = None) -> None:
    """status.json: rank 0's word on success, and that of the rank that failed otherwise."""
    if progress.worker and (code or here.is_main):
        progress.worker.folder.status(code=code, reason=reason, rank=here.rank, step=step or progress.step)


def _check_report_path(resolved: Resolved) -> None:
    """A run must not find at its end that report=PATH cannot be written."""
    target = resolved.report
    if target and (target.is_dir() or not os.access(target.parent, os.W_OK)):
        raise RecipeError(f"report=PATH must be a file in a folder that can be written; {target} is not.")


def _print_error(error: LauncherError, here: RankInfo) -> None:
    if here.local_rank == 0 or error.code not in SHARED_CODES:
        prefix = f"rank {here.rank}: " if here.world_size > 1 and error.code not in SHARED_CODES else ""
        print_error(make_console(sys.stderr), prefix + str(error), error.code)
