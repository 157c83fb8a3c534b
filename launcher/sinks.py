"""What a run's events are shown to. A sink of the caller may fail: then the run saves, ends, and says which one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any, Protocol
from weakref import WeakMethod

from launcher.errors import SinkError
from launcher.records.run import Event, Phase, StepRecord
from launcher.runtime.signals import ask_to_stop


class Sink(Protocol):
    """Something that a run's events are shown to, each as it comes: the console, files, a tracker.

    It may have a method `close()`, which is called once when the run has ended, well or not.
    """

    def show(self, event: Event) -> None: ...


class GuardedSink:
    """A sink of the caller. While steps are trained its `failure` is kept, and the loop is asked to save and stop; once
    they are, the run comes to its end; before them nothing would be lost, and the failure is raised."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self._trained = sink, False
        self.failure: SinkError | None = None

    def show(self, event: Event) -> None:
        if self.failure:
            return
        self._trained = self._trained or isinstance(event, StepRecord)
        try:
            self._sink.show(event)
        except Exception as error:
            self.failure = SinkError(
                f"a sink must take every event; {_fault(self._sink, 'show', error)}, given {_named(event)}.\n"
                "Mend it or leave it out."
            )
            self.failure.__cause__ = error
            if not (ask_to_stop() or self._trained):
                raise self.failure from error


def light(event: Event) -> Event:
    """The event for who may keep it: the progress of a phase does not hold the model."""
    if not isinstance(event, Phase) or not isinstance(event.progress, MethodType):
        return event
    reference = WeakMethod(event.progress)
    return replace(event, progress=lambda: progress() if (progress := reference()) else "")


@contextmanager
def closed_at_end(sinks: Sequence[Any]) -> Iterator[None]:
    """Afterwards calls `close()` of the sinks that have it. Its errors are added to the failure of the run; where there
    is none, also where the caller left the events, raises SinkError."""
    try:
        yield
    except GeneratorExit:
        pass
    except BaseException as failure:
        for fault in _close(sinks):
            failure.add_note(fault)
        raise
    if faults := _close(sinks):
        raise SinkError(f"a sink must close; {'; '.join(faults)}.\nAll else is done: the run and its files are whole.")


def _close(sinks: Sequence[Any]) -> list[str]:
    faults = []
    for sink in sinks:
        try:
            if close := getattr(sink, "close", None):
                close()
        except Exception as error:
            faults.append(_fault(sink, "close", error))
    return faults


def _fault(sink: object, method: str, error: Exception) -> str:
    return f"{type(sink).__name__}.{method} raised {type(error).__name__}: {error}"


def _named(event: Event) -> str:
    if isinstance(event, str):
        return repr(event)
    step = getattr(event, "step", None)
    return type(event).__name__ + ("" if step is None else f" of step {step}")
