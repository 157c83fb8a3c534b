"""The files of a run, all in its folder: rank 0's metrics.jsonl and report.json, and status.json: how the run ended."""

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.errors import CheckpointError, RecipeError
from launcher.records.run import EvalRecord, Event, RunOpened, RunRecord, StepRecord

FOLLOWING_CODES = (1, 8, 130, 143)  # a rank may end with these because another one failed


class RunFolder:
    """`run.output_dir`, or runs/<recipe>-<time>. Nothing of a run is written anywhere else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics, self.report, self.status = (
            path / name for name in ("metrics.jsonl", "report.json", "status.json")
        )
        self.adapter = path / "adapter"
        self.adapter_staging = path / "adapter.part"  # until the adapter is proved

    def check(self) -> None:
        """Raise as `create` would, as far as that can be told; makes nothing."""
        ancestor = next(path for path in (self.path, *self.path.parents) if os.path.exists(path))
        with self._refusals():
            if not ancestor.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if any(path.exists() for path in (self.status, self.report, self.adapter, self.metrics)):
                raise FileExistsError
            if not os.access(ancestor, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def create(self) -> None:
        """Make the folder. Raises CheckpointError if it holds a run already, RecipeError if it cannot be made."""
        self.check()
        with self._refusals():
            self.path.mkdir(parents=True, exist_ok=True)
            open(self.metrics, "x").close()  # of two runs that start together one gets it

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

    def discard(self) -> None:
        """Remove what `create` made, if nothing was measured yet; other files in the folder are the user's."""
        self.metrics.unlink()
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
            self._folder = RunFolder(event.path)
        if isinstance(event, StepRecord):
            self._step = event.step
        if self._rank or self._folder is None:
            return
        if isinstance(event, StepRecord | EvalRecord):
            with open(self._folder.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(asdict(event))) + "\n")
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
        if code in FOLLOWING_CODES and folder.status.exists():
            cause = json.loads(folder.status.read_text(encoding="utf-8"))["code"]
            if cause not in FOLLOWING_CODES:
                return
        shutil.rmtree(folder.adapter_staging, ignore_errors=True)
        if code in (2, 3) and not folder.metrics.stat().st_size:
            folder.discard()
            return
        status = {"code": code, "reason": reason, "rank": self._rank, "step": step or self._step, "resumable": False}
        write_json(folder.status, status)


def default_folder(recipe: str) -> str:
    """runs/<recipe>-<time>, with a counter where two runs start within a second. Absolute."""
    base = Path.cwd() / "runs" / f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, count = base, 1
    while path.exists():
        count += 1
        path = base.with_name(f"{base.name}-{count}")
    return str(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all: a reader never sees half a file. NaN and infinity become null."""
    staging = path.with_name(f"{path.name}.{os.getpid()}.part")  # several ranks may report one failure
    staging.write_text(json.dumps(_finite(content), indent=2) + "\n", encoding="utf-8")
    os.replace(staging, path)


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
