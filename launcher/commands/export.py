"""mode=export: a model for stock code, and the proof that it is the trained one."""

from pathlib import Path
from typing import Any

from launcher.checkpoint.files import write_json
from launcher.commands.finished_run import Invocation, located
from launcher.errors import CheckpointError
from launcher.export.place import check_gguf, check_target
from launcher.recipe.run_options import ExportOptions
from launcher.report import Screen
from launcher.runtime.clock import seconds_since
from launcher.runtime.environment import quick_imports
from launcher.runtime.failures import classified


def export_model(options: ExportOptions, invocation: Invocation) -> None:
    """Write the model and prove it. Raises CheckpointError where it is not the trained one."""
    info, report = invocation.rank_info, invocation.report
    to = Path(options.to).expanduser().absolute()
    check_target(to)
    if options.format == "gguf":
        check_gguf(options.quantization)
    place, source = located(options)
    record: Any = None
    with Screen(invocation.console, clock=seconds_since()) as screen, classified(info):
        screen.show("importing torch")
        with quick_imports():
            from launcher.export.load_run import open_run
            from launcher.export.write import export

        for record in export(open_run(place, source, info), options, to):
            screen.show(record)
        if report:
            write_json(report, record.as_report())
    if not record.holds:
        raise CheckpointError(record.failure)
