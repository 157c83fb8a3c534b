"""The table of the modes that use a finished run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.commands.compare import compare_runs
from launcher.commands.evaluate import evaluate_adapter
from launcher.commands.export import export_model
from launcher.commands.finished_run import Invocation
from launcher.commands.generate import answer_prompts
from launcher.commands.push import push_model
from launcher.commands.report import report_run
from launcher.errors import RecipeError
from launcher.preflight.before_torch import check_report
from launcher.recipe.command_line import parse
from launcher.recipe.run_options import read_options
from launcher.runtime.environment import prepare_environment
from launcher.runtime.ranks import RankInfo
from launcher.runtime.signals import Terminated

RUN_COMMANDS: dict[str, Callable[[Any, Invocation], None]] = {  # by mode: the keys of OPTIONS_OF
    "generate": answer_prompts,
    "export": export_model,
    "push": push_model,
    "evaluate": evaluate_adapter,
    "report": report_run,
    "compare": compare_runs,
}


def run_command(argv: Sequence[str], info: RankInfo, console: Console) -> None:
    """Run a command line whose mode is a key of RUN_COMMANDS. Raises the errors of launcher/errors.py."""
    given = parse(argv).options
    mode, report = given["mode"], Path(given["report"]).absolute() if given["report"] else None
    if info.world_size > 1:
        raise RecipeError(f"mode={mode} runs in one process; {info.world_size} were started. Run launcher/main.py.")
    prepare_environment()  # before an option's check imports a library
    options = read_options(argv, mode)
    if report:
        check_report(report)
    try:
        RUN_COMMANDS[mode](options, Invocation(info, console, report))
    except (KeyboardInterrupt, Terminated) as stop:
        rest = "all of it is committed, or nothing: run it again" if mode == "push" else "nothing of it is left"
        raise type(stop)(str(stop) or rest) from None
