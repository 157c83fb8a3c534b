"""mode=evaluate: loss, perplexity and token accuracy of a run's adapter."""

from typing import Any

from launcher.checkpoint.files import write_json
from launcher.commands.finished_run import Invocation, located
from launcher.errors import CheckpointError
from launcher.preflight.before_torch import check_data
from launcher.recipe.run_options import EvaluateOptions
from launcher.report import Screen
from launcher.runtime.clock import seconds_since
from launcher.runtime.environment import quick_imports
from launcher.runtime.failures import classified


def evaluate_adapter(options: EvaluateOptions, invocation: Invocation) -> None:
    """Measure and show. Raises CheckpointError where the loss is not what the run measured on the same data."""
    info = invocation.rank_info
    place, source = located(options)
    for data in options.data or ():
        check_data(data)
    record: Any = None
    with Screen(invocation.console, clock=seconds_since()) as screen, classified(info):
        screen.show("importing torch")
        with quick_imports():
            from launcher.export.evaluate import evaluation
            from launcher.export.load_run import open_run

        for record in evaluation(open_run(place, source, info), options):
            screen.show(record)
        if invocation.report:
            write_json(invocation.report, record.as_report())
    if not record.holds:
        raise CheckpointError(record.failure)
