"""The console of one run: hand it every record as it comes, in whatever order a run makes them."""

from types import TracebackType
from typing import Self

from rich.console import Console

from launcher.records.run import EvalRecord, Event, RunRecord, StartRecord, StepRecord
from launcher.report.progress import Progress
from launcher.report.run_summary import summary
from launcher.report.start import start_panel


class Screen:
    """Context manager. Phases are announced at once; the step line begins with the StartRecord."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(console, 0)

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, failure, trace)

    def show(self, event: Event) -> None:
        """Print one record, or the name of the phase that begins."""
        if isinstance(event, str):
            self._progress.phase(event)
        elif isinstance(event, StepRecord):
            self._progress.step(event)
        elif isinstance(event, EvalRecord):
            self._progress.evaluation(event)
        elif isinstance(event, StartRecord):
            self._progress.__exit__(None, None, None)
            start_panel(self._console, event)
            self._progress = Progress(self._console, event.steps, device=event.device)
            self._progress.__enter__()
        elif isinstance(event, RunRecord):
            self._progress.__exit__(None, None, None)
            summary(self._console, event)
            self._progress = Progress(self._console, 0)
