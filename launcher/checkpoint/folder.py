"""The files of a run, all in its folder: rank 0's metrics.jsonl and report.json, and status.json: how the run ended."""

import errno
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from launcher.errors import CheckpointError, RecipeError
from launcher.records.run import BadBatch, EvalRecord, EvalSamples, Event, RunOpened, RunRecord, StepRecord

# Codes that a rank may end with because another failed; the higher, the less they say of the cause.
LESS_TELLING = {1: 1, 130: 1, 143: 1, 8: 2}


class RunFolder:
    """`run.output_dir`, or runs/<recipe>-<time>. Nothing of a run is written anywhere else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics, self.report, self.status = (
            path / name for name in ("metrics.jsonl", "report.json", "status.json")
        )
        self.samples, self.bad_batches = path / "samples.jsonl", path / "bad_batches"
        self.adapter = path / "adapter"
        self.adapter_staging = path / "adapter.part"  # until the adapter is proved
        self.checkpoints = path / "checkpoints"
        self._lock = FileLock(path / "run.lock", blocking=False)

    def check(self, *, resume: str = "never") -> None:
        """Raise as `create` would, as far as that can be told; makes nothing. Where run.resume allows it, a folder with
        checkpoints is no fault, nor one of a run that ended before it saved any."""
        ancestor = next(path for path in (self.path, *self.path.parents) if os.path.exists(path))
        if resume not in ("auto", "never") and not Path(resume).is_dir():
            there = ", ".join(sorted(path.name for path in self.checkpoints.glob("step-*[0-9]"))) or "none"
            raise CheckpointError(
                "run.resume must be auto, never, or the folder of a run or of one of its checkpoints; "
                f"got {resume}, which is no folder; checkpoints there: {there}."
            )
        results, files = (self.report, self.adapter), (self.status, self.metrics, self.checkpoints)
        with self._refusals():
            if not ancestor.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            taken = results if resume != "never" else (*results, *files)
            if any(path.exists() for path in taken) and not (resume != "never" and self.has_checkpoints):
                raise FileExistsError
            if self.checkpoints.is_symlink():
                raise OSError(errno.ELOOP, "checkpoints/ is a link, which is not followed")
            if not os.access(ancestor, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def create(self, *, resume: str = "never") -> None:
        """Make the folder and take it. Raises CheckpointError if it holds a run already, or if another process has it,
        RecipeError if it cannot be made. The metrics of a run that ended before it saved anything are set aside."""
        self.check(resume=resume)
        with self._refusals():
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            if self.metrics.exists():
                self.metrics.replace(self.path / "metrics.earlier.jsonl")
            self.status.unlink(missing_ok=True)
            open(self.metrics, "x").close()

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise CheckpointError(
                f"run.output_dir must not hold another run; {self.path} does. Choose another folder or remove it."
            ) from None
        except OSError as error:
            raise RecipeError(
                f"run.output_dir must be a folder that can be written; {self.path}: {error.strerror}. Choose another."
            ) from None

    @property
    def finished(self) -> bool:
        """Whether the run in this folder came to its good end."""
        try:
            return json.loads(self.status.read_text(encoding="utf-8"))["code"] == 0
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @property
    def has_checkpoints(self) -> bool:
        """Whether there are finished bundles, whole or damaged."""
        return any(self.checkpoints.glob("step-*[0-9]"))

    def lock(self) -> None:
        """Take the folder for this process until `unlock` or its end. Raises CheckpointError naming the process that
        has it."""
        path = Path(self._lock.lock_file)
        try:
            self._lock.acquire()
        except Timeout:
            raise CheckpointError(
                f"run.output_dir must not be in use; process {path.read_text()} trains in {self.path}. "
                "Wait for its end, or choose another folder."
            ) from None
        path.write_text(f"{os.getpid()} on {platform.node()}", encoding="utf-8")

    def unlock(self) -> None:
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release(force=True)

    def discard(self) -> None:
        """Remove what `create` made, if nothing was measured yet; other files in the folder are the user's."""
        self.metrics.unlink()
        Path(self._lock.lock_file).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()


class RunFiles:
    """A sink of a run's events: rank 0 writes metrics.jsonl and report.json, the rank that ends it status.json.

    `report_copy` is where else the report is written.
    """

    def __init__(self, rank: int, *, report_copy: Path | None = None) -> None:
        self._rank, self._report_copy = rank, report_copy
        self._folder: RunFolder | None = None  # None until it is this run's: another run's is left alone
        self._step = 0

    def show(self, event: Event) -> None:
        if isinstance(event, RunOpened):
            self._folder, self._step = RunFolder(event.path), event.step
        if isinstance(event, StepRecord):
            self._step = event.step
        if isinstance(event, BadBatch) and self._folder:
            _write_batch(self._folder.bad_batches, event)
        if self._rank or self._folder is None:
            return
        if isinstance(event, EvalSamples):
            lines = [json.dumps({"step": event.step, **asdict(sample)}) + "\n" for sample in event.samples]
            with open(self._folder.samples, "a", encoding="utf-8") as file:
                file.write("".join(lines))
        if isinstance(event, StepRecord | EvalRecord):
            with open(self._folder.metrics, "a", encoding="utf-8") as file:
                file.write(metrics_line(event))
        elif isinstance(event, RunRecord):
            write_json(self._folder.report, event.as_report())
            if self._report_copy:
                shutil.copyfile(self._folder.report, self._report_copy)

    def end(self, *, code: int, reason: str, step: int | None = None) -> None:
        """Write status.json: on success rank 0's, else the failed rank's. The launcher masks exit codes as 1.

        When one rank fails the others fail after it, of a closed connection or a signal: their status never replaces
        the cause. A run that fails with code 2 or 3 before its first metric leaves no folder.
        """
        folder = self._folder
        if folder is None or (self._rank and not code):
            return
        if folder.status.exists():
            cause = json.loads(folder.status.read_text(encoding="utf-8"))["code"]
            if LESS_TELLING.get(code, 0) >= LESS_TELLING.get(cause, 0):
                return
        shutil.rmtree(folder.adapter_staging, ignore_errors=True)
        if code in (2, 3) and not folder.metrics.stat().st_size:
            folder.discard()
            return
        status = {"code": code, "reason": reason, "rank": self._rank, "step": step or self._step}
        status["resumable"] = bool(code) and folder.has_checkpoints
        write_json(folder.status, status)


def check_report_path(path: Path | None) -> None:
    """Raise RecipeError where report=PATH cannot be written."""
    if path and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise RecipeError(f"report=PATH must be a file in a folder that can be written; {path} is not.")


def named_folder(resume: str) -> Path | None:
    """The run folder that run.resume names, by itself or by one of its checkpoints; None for auto and never."""
    if resume in ("auto", "never"):
        return None
    path = Path(resume).absolute()
    return path.parents[1] if path.name.startswith("step-") and path.parent.name == "checkpoints" else path


def default_folder(recipe: str) -> str:
    """runs/<recipe>-<time>, with a counter where two runs start within a second. Absolute."""
    base = Path.cwd() / "runs" / f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, count = base, 1
    while path.exists():
        count += 1
        path = base.with_name(f"{base.name}-{count}")
    return str(path)


def _write_batch(folder: Path, batch: BadBatch) -> None:
    """A line for each document. A full disk must not hide what is wrong with the step."""
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        lines = [json.dumps(asdict(document)) + "\n" for document in batch.documents]
        write_text(folder / f"step-{batch.step}-rank-{batch.rank}.jsonl", "".join(lines))


def metrics_line(record: StepRecord | EvalRecord) -> str:
    """The record's line of metrics.jsonl; null for what JSON lacks."""
    return json.dumps(_finite(asdict(record))) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As `write_text`. NaN and infinity become null."""
    write_text(path, json.dumps(_finite(content), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all: a reader never sees half a file."""
    staging = path.with_name(f"{path.name}.{os.getpid()}.part")  # several ranks may report one failure
    try:
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
