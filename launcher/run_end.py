"""The end of a run that fails: what was trained is kept; status.json, and a report where the compile contract broke,
say why. Of several causes the first counts."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from launcher.checkpoint.run_files import RunFiles
from launcher.commands.past_run import read_run
from launcher.report import error as print_error
from launcher.report import make_console
from launcher.runtime.failures import code_and_reason
from launcher.runtime.heartbeat import Heartbeat
from launcher.runtime.parent import under_launcher
from launcher.runtime.ranks import RankInfo
from launcher.runtime.watched_ranks import Ending
from launcher.sinks import GuardedSink
from launcher.train.request import Request


def record_failure(
    failure: BaseException,
    request: Request,
    history: Any,
    heartbeat: Heartbeat,
    files: RunFiles,
    guarded: Sequence[GuardedSink],
) -> BaseException:
    """Keep what was trained and write status.json and, where the compile contract broke, a report; returns what ends
    the run."""
    from launcher.train.rescue import rescue

    try:
        rescue(history.worker, failure)
    except Exception as error:  # must not take the place of the failure
        failure.add_note(f"The adapter could not be kept: {type(error).__name__}: {error}")
    cause = heartbeat.first_cause(failure)
    if isinstance(cause, KeyboardInterrupt) and (refusal := next(filter(None, (s.failure for s in guarded)), None)):
        refusal.add_note(str(cause))  # what was saved
        cause = refusal
    code, reason = code_and_reason(cause)
    broken, written = getattr(cause, "explanations", ()), False
    with suppress(OSError):  # a full disk must not hide what ended the run
        where = {"step": getattr(cause, "step", None), "rank": getattr(cause, "rank", None)}
        written = files.end(code=code, reason=reason, **where, explanations=broken)
    if written and broken:
        try:
            recipe, origins = request.recipe.model_dump(mode="json"), dict(request.origins)
            files.report_broken(read_run, recipe=recipe, recipe_origins=origins)
        except Exception as error:  # of libraries too
            cause.add_note(f"The report could not be written: {type(error).__name__}: {error}")
    return cause


def record_loss(files: RunFiles, info: RankInfo, ending: Ending, told: bool) -> None:
    """Before another rank's end ends this process, which may happen without a further word. One rank prints it: the one
    that tells its own end, or the first that found another's; for a rank of another machine rank 0 too."""
    written = True
    with suppress(OSError, ValueError):  # the folder may be on another machine
        written = files.end(code=ending.code, reason=ending.reason, step=ending.step, rank=ending.rank)
    console = make_console(sys.stderr)
    if (info.is_main and ending.rank >= info.local_world_size) if told else written:
        print_error(console, ending.reason, ending.code, framed=under_launcher())
    console.show_cursor()  # the live line hides it
