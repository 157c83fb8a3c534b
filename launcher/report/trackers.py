"""Trackers: hand a run's figures to other tools. A tracker never ends a run, and never holds it up.

Each tool has a thread of its own: an event is put into its queue, and what waits there is handed over together. A tool
that raises, or does not come back, is switched off for the rest of the run; a note says so on the console and in the
report. Trackers receive the RunRecord, as any sink; `noting` adds the notes of what failed before it to it.
"""

import importlib.util
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from launcher.credentials import masked_record, masked_tree, shortened
from launcher.errors import RecipeError
from launcher.records.run import EvalRecord, EvalSamples, Event, Note, RunOpened, RunRecord, StepRecord
from launcher.report.pages.formatting import recipe_keys
from launcher.report.tracking_tools import TOOLS, TrackingTool, flat_scalars

STALL_S = 60.0  # a call that takes longer switches the tool off
CLOSE_S = 10.0  # for all tools together, at the end of a run
REASON = 300  # characters of an error

StepFigures = dict[str, float]


class Trackers:
    """A sink of a run's events that hands them to the tools of `names`. One process of a run has it.

    `config`: the resolved recipe, nested.
    """

    def __init__(self, names: Sequence[str], config: Mapping[str, Any]) -> None:
        keys = recipe_keys(masked_tree(dict(config)))
        self._config = {
            key: value if isinstance(value, str | int | float) else json.dumps(value) for key, value in keys.items()
        }
        self._names, self._threads = names, list[_ToolThread]()
        self._finished, self._said = False, set[str]()
        self._before = sys.exception()  # a run may be started where another error is handled

    def show(self, event: Event) -> None:
        if isinstance(event, RunOpened):
            self._threads = [_ToolThread(name, event, self._config) for name in self._names]
        elif isinstance(event, StepRecord | EvalRecord | EvalSamples | RunRecord):
            self._finished = isinstance(event, RunRecord)
            event = masked_record(event)
            for thread in self._threads:
                thread.put(event)

    def noting(self, events: Iterable[Event]) -> Iterator[Event]:
        """The events, and a Note for each tool once it has failed; the RunRecord with all these notes."""
        for event in events:
            for thread in self._threads:
                thread.check_stalled()
            yield from map(Note, self._unsaid())
            if isinstance(event, RunRecord) and self._said:
                event = replace(event, notes=(*event.notes, *sorted(self._said)))
            yield event

    def close(self) -> tuple[str, ...]:
        """Finish the tools' runs, within CLOSE_S; returns notes of those that failed since the last event. The run
        has failed if an error is on its way while this is called, or if there was no RunRecord."""
        failure = sys.exception()
        if failure is self._before or isinstance(failure, GeneratorExit):  # who leaves the events may have seen all
            failure = None
        code = 0 if self._finished and failure is None else getattr(failure, "code", None) or 1
        reason = f": {_reason(failure)}" if failure else ""
        status = f"failed{reason}" if code else "finished"
        end_s = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.put((status, code))
        for thread in self._threads:
            thread.join(end_s - time.monotonic())
        unsaid, self._threads = self._unsaid(), []
        return unsaid

    def _unsaid(self) -> tuple[str, ...]:
        faults = tuple(thread.fault for thread in self._threads if thread.fault and thread.fault not in self._said)
        self._said.update(faults)
        return faults


class _ToolThread:
    """One tool, driven from its own thread. `fault`: why it was switched off; "" while it works."""

    def __init__(self, name: str, opened: RunOpened, config: Mapping[str, Any]) -> None:
        self.fault = ""
        self._name, self._opened, self._config = name, opened, config
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call_began_s: float | None = time.monotonic()
        self._last_step = opened.step
        self._thread = threading.Thread(target=self._drive, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, item: Any) -> None:
        if not self.fault:
            self._queue.put(item)

    def check_stalled(self) -> None:
        began_s = self._call_began_s
        if began_s is not None and time.monotonic() - began_s > STALL_S:
            self._switch_off(f"it did not answer for {STALL_S:.0f} s")

    def join(self, timeout_s: float) -> None:
        if not self.fault:  # a tool that stalls is not waited for
            self._thread.join(max(0.0, timeout_s))
        if self._thread.is_alive():
            self._switch_off(f"it took longer than {CLOSE_S:.0f} s to finish; its last figures may be missing")

    def _switch_off(self, reason: str) -> None:
        where = "metrics.jsonl and report.json have all figures"
        self.fault = self.fault or f"tracker {self._name} was switched off: {reason}. {where}."

    def _drive(self) -> None:
        try:
            file = self._opened.path / "trackers" / f"{self._name}.json"
            known = json.loads(file.read_text()) if file.exists() else {}
            tool = TOOLS[self._name](self._opened.path, known.get("id"))
            tool.start(self._config, step=self._opened.step)
            done: dict[str, int] = known.get("done", {})  # the last step of each kind of event
            begins_after = {} if tool.rewinds else dict(done)
            _keep(file, tool, done)
            while not self.fault:
                self._call_began_s = None
                items = [self._queue.get()]
                self._call_began_s = time.monotonic()
                while not self._queue.empty():
                    items.append(self._queue.get())
                items = [item for item in items if _step(item) > begins_after.get(type(item).__name__, -1)]
                done |= {type(item).__name__: item.step for item in items if hasattr(item, "step")}
                ended = self._hand_over(tool, items)
                _keep(file, tool, done)
                if ended:
                    break
        except BaseException as error:  # a tool may call sys.exit, which in a thread ends nothing and says nothing
            self._switch_off(_reason(error))

    def _hand_over(self, tool: TrackingTool, items: Sequence[Any]) -> bool:
        """In their order, figures that follow each other together. Whether the last item was the end."""
        for are_figures, group in groupby(items, key=lambda item: isinstance(item, StepRecord | EvalRecord)):
            if are_figures:
                rows = [(item.step, _figures(item)) for item in group]
                self._last_step = rows[-1][0]
                tool.log(rows)
                continue
            for item in group:
                if isinstance(item, EvalSamples):
                    samples = [{"step": item.step, **asdict(sample)} for sample in item.samples]
                    if samples:
                        tool.table("eval_samples", samples, step=item.step)
                elif isinstance(item, RunRecord):
                    _hand_record(tool, item, step=self._last_step)
                else:
                    tool.finish(*item, step=self._last_step)
        return bool(items) and isinstance(items[-1], tuple)


def _step(item: Any) -> float:
    return getattr(item, "step", float("inf"))


def _figures(event: StepRecord | EvalRecord) -> StepFigures:
    if isinstance(event, EvalRecord):
        return {"eval_loss": event.eval_loss}
    speed = {"tokens_per_s": event.tokens / max(event.step_s, 1e-9), "step_s": event.step_s, "vram_mib": event.vram_mib}
    return {"loss": event.loss, "lr": event.lr, "grad_norm": event.grad_norm, **speed}


def _hand_record(tool: TrackingTool, record: RunRecord, *, step: int) -> None:
    report = record.as_report()
    values = {name: report[name] for name in ("loss", "elapsed_s", "data", "stopped")}
    values["ranks"] = {str(rank["rank"]): rank for rank in report["ranks"]}
    held = sum(verdict.holds for verdict in record.verdicts)
    values["verdicts"] = {"held": held, "failed": len(record.verdicts) - held}
    tool.summary({name: value for name, value in flat_scalars(values) if value != ""}, step=step)
    if report["verdicts"]:
        tool.table("verdicts", report["verdicts"], step=step)
    if report["sample"]:
        tool.table("sample", [report["sample"]], step=step)


def _keep(file: Path, tool: TrackingTool, done: Mapping[str, int]) -> None:
    """So that a resumed run goes on in the same run of the tool; written whole or not at all."""
    file.parent.mkdir(exist_ok=True)
    staging = file.with_suffix(".part")
    staging.unlink(missing_ok=True)  # of a killed process, or a link that someone planted
    with open(staging, "x", encoding="utf-8") as text:
        json.dump({"id": tool.identity, "done": done}, text)
    os.replace(staging, file)


def _reason(error: BaseException) -> str:
    text = shortened(str(error), REASON).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def make_trackers(names: Sequence[str], config: Mapping[str, Any], *, is_main: bool = True) -> Trackers:
    """The sink for these names; where not `is_main` it drives none. Raises RecipeError on every rank where a package is
    not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"run.trackers must be installed; {', '.join(missing)} is not. pip install -e '.[trackers]'")
    return Trackers(names if is_main else (), config)
