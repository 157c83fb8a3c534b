"""mode=push: an adapter or an exported model, with its card, to the hub."""

from typing import Any

from launcher.checkpoint.files import write_json
from launcher.commands.finished_run import Invocation
from launcher.export.push import plan_push, push
from launcher.recipe.run_options import PushOptions
from launcher.report import Screen
from launcher.runtime.clock import seconds_since
from launcher.runtime.failures import classified


def push_model(options: PushOptions, invocation: Invocation) -> None:
    """Push it. Raises RecipeError where that must not or cannot be."""
    record: Any = None
    with Screen(invocation.console, clock=seconds_since()) as screen, classified(invocation.rank_info):
        for record in push(plan_push(options), options):
            screen.show(record)
    if invocation.report:
        write_json(invocation.report, record.as_report())
