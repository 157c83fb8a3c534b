"""The files of a run, all in its folder: rank 0's metrics.jsonl and report.json, and status.json: how the run ended."""

import json
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

from launcher.checkpoint.files import append_text, finite, write_json, write_text, writing
from launcher.checkpoint.folder import RunFolder
from launcher.errors import LESS_TELLING, LauncherError, is_full_disk
from launcher.records.explanation import Explanation
from launcher.records.past import UnfinishedRun
from launcher.records.run import (
    BadBatch,
    EvalRecord,
    EvalSamples,
    Event,
    RunOpened,
    RunRecord,
    StartRecord,
    StepRecord,
)

PageMaker: TypeAlias = Callable[[Any], str]  # of a record


class RunFiles:
    """A sink of a run's events: rank 0 writes metrics.jsonl and report.json, the rank that ends it status.json.

    `report_copy` is where else the report is written; `card` and `html` make the adapter's README.md and report.html.
    """

    def __init__(
        self,
        rank: int,
        *,
        report_copy: Path | None = None,
        card: PageMaker | None = None,
        html: PageMaker | None = None,
    ) -> None:
        self._rank, self._report_copy, self._card, self._html = rank, report_copy, card, html
        self._record: RunRecord | None = None  # once it is written
        self._folder: RunFolder | None = None  # None until it is this run's: another run's is left alone
        self._step, self._ending = 0, threading.Lock()
        self._start: StartRecord | None = None  # once it was shown

    def show(self, event: Event) -> None:
        if isinstance(event, RunOpened):
            self._folder, self._step = RunFolder(event.path), event.step
            self._folder.hold()
        elif isinstance(event, StartRecord):
            self._start = event
        elif isinstance(event, StepRecord):
            self._step = event.step
        if isinstance(event, BadBatch) and self._folder:
            _write_batch(self._folder.bad_batches, event)
        if self._rank or self._folder is None:
            return
        if isinstance(event, EvalSamples):
            lines = [json.dumps({"step": event.step, **asdict(sample)}) + "\n" for sample in event.samples]
            self._append(self._folder, self._folder.samples, "".join(lines))
        elif isinstance(event, StepRecord | EvalRecord):
            self._append(self._folder, self._folder.metrics, metrics_line(event))
        elif isinstance(event, RunRecord):
            self._record = event
            self._write_report(self._folder, event)

    def with_pages(self, record: RunRecord) -> RunRecord:
        """The record, once rank 0 has written what people read: the card of the adapter that it saved, and report.html.
        What cannot be written is noted: nothing that was trained is lost without it."""
        folder = self._folder
        if self._rank or folder is None:
            return record
        pages = [(folder.page, self._html, "mode=report html=PATH writes it")]
        if record.verdicts[-1].holds:  # the last verdict is the adapter's
            pages.append((folder.adapter / "README.md", self._card, "mode=push makes it from report.json"))
        notes = []
        for path, page, remedy in pages:
            try:
                folder.check_in_place()
                if page:
                    write_text(path, page(record))
            except Exception as error:  # of libraries too
                notes.append(f"{path.name} could not be written: {type(error).__name__}: {error}; {remedy}")
        return replace(record, notes=(*record.notes, *notes)) if notes else record

    def add_notes(self, notes: Sequence[str]) -> None:
        """Write report.json again with what was noticed after it was written. That the disk is full ends no run now."""
        if notes and self._record:
            with suppress(LauncherError, OSError):
                self.show(replace(self._record, notes=(*self._record.notes, *notes)))

    def _append(self, folder: RunFolder, file: Path, text: str) -> None:
        with writing(folder.path, what=f"What is added to {file.name}", needed=len(text)):
            folder.check_in_place()
            append_text(file, text)

    @property
    def saving(self) -> bool:
        """Whether a checkpoint or the adapter is being written; another process may ask, too."""
        folder = self._folder
        return folder is not None and (folder.adapter_staging.exists() or any(folder.checkpoints.glob("step-*.part")))

    def end(
        self,
        *,
        code: int,
        reason: str,
        step: int | None = None,
        rank: int | None = None,
        explanations: Sequence[Explanation] = (),
    ) -> bool:
        """Write status.json: on success rank 0's, else that of `rank`, the one to blame (None: this one). The launcher
        masks exit codes as 1. Returns whether it was written: the first cause stays, unless it only followed from
        another (LESS_TELLING). A run that fails with code 2 or 3 before its first metric leaves no folder.
        """
        folder = self._folder
        if folder is None or (self._rank and not code):
            return False
        status: dict[str, Any] = {"code": code, "reason": reason, "rank": self._rank if rank is None else rank}
        status |= {"step": self._step if step is None else step, "resumable": bool(code) and folder.has_checkpoints}
        status |= {"explanations": [asdict(explanation) for explanation in explanations]} if explanations else {}
        with nullcontext() if code else writing(folder.path, what="status.json"):
            folder.check_in_place()
            if code in (2, 3) and not folder.metrics.stat().st_size:
                folder.discard()
                return False
            with self._ending:  # the thread that watches the other ranks may write at the same moment
                return _write_first(folder, status, own=folder.status.with_name(f"status.json.{self._rank}.part"))

    def report_broken(self, read: Callable[[str], Any], **given: Any) -> None:
        """Write report.json and report.html of a run whose compile contract broke, as far as they go; on the rank that
        has written status.json. `read` gives what the folder tells of the run; `given` are fields that it does not."""
        folder, run = self._folder, read(str(self._folder.path if self._folder else ""))
        if folder and isinstance(run, UnfinishedRun):  # one that came to its end has its report
            run = replace(run, in_use=False, start=self._start, **given)
            self._write_report(folder, run)
            if self._html:
                write_text(folder.page, self._html(run))

    def _write_report(self, folder: RunFolder, run: RunRecord | UnfinishedRun) -> None:
        for path in filter(None, (folder.report, self._report_copy)):
            with writing(path.parent, what="The report"):
                folder.check_in_place()
                write_json(path, run.as_report())


def _write_first(folder: RunFolder, status: dict[str, Any], *, own: Path) -> bool:
    """Write status.json if no rank has, or only a less telling one; whether it was written. `own` is a name that no
    other process uses. Ranks may end at one moment: of two links to one name the kernel makes one."""
    try:
        write_json(own, status)
    except OSError as error:
        if not (is_full_disk(error) and folder.free_block()):
            raise
        write_json(own, status)
    try:
        os.link(own, folder.status)
    except OSError:  # there is one, or this file system has no hard links
        cause, rank = folder.code_and_rank  # None: that is no status
        tells_more = (cause, rank) == (status["code"], status["rank"]) and "explanations" in status  # than whom it told
        if cause is not None and not tells_more and (status["code"] in LESS_TELLING or cause not in LESS_TELLING):
            return False
        own.replace(folder.status)
    finally:
        own.unlink(missing_ok=True)
    return True


def _write_batch(folder: Path, batch: BadBatch) -> None:
    """A line for each document. A full disk must not hide what is wrong with the step."""
    with suppress(OSError):
        if folder.is_symlink():
            return
        folder.mkdir(exist_ok=True)
        lines = [json.dumps(asdict(document)) + "\n" for document in batch.documents]
        write_text(folder / f"step-{batch.step}-rank-{batch.rank}.jsonl", "".join(lines))


def metrics_line(record: StepRecord | EvalRecord) -> str:
    """The record's line of metrics.jsonl; null for what JSON lacks."""
    return json.dumps(finite(asdict(record))) + "\n"
