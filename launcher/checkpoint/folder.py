"""The folder of a run: where its files are, who may use it, and whether it is still there."""

import errno
import fcntl
import json
import os
import platform
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from launcher.checkpoint.files import refusing_links, writable
from launcher.errors import CheckpointError, RecipeError

PREFIX = "step-"  # of a checkpoint's name
MARKS = ("metrics.jsonl", "status.json", "report.json")  # a folder that has one is a run's
PARTS_OF_A_RUN = re.compile(rf"\.|adapter|checkpoints(/{PREFIX}\d+(/adapter)?)?")


class RunFolder:
    """`run.output_dir`, or runs/<recipe>-<time>. Nothing of a run is written anywhere else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics, self.report, self.status, self.parts = (
            path / name for name in ("metrics.jsonl", "report.json", "status.json", "parts.json")
        )
        self.page = path / "report.html"
        self.samples, self.bad_batches = path / "samples.jsonl", path / "bad_batches"
        self.adapter = path / "adapter"
        self.adapter_staging = path / "adapter.part"  # until the adapter is proved
        self.checkpoints = path / "checkpoints"
        # Not at once: another process that looks whether the folder is in use has the lock for a moment.
        self._lock = FileLock(path / "run.lock", timeout=0.2)
        self._handle: int | None = None
        self._locked_file: os.stat_result | None = None  # the lock file, once this process holds it

    def check(self, *, resume: str = "never") -> None:
        """Raise as `create` would, as far as that can be told; makes nothing. Where run.resume allows it, a folder with
        checkpoints is no fault, nor one of a run that ended before it saved any."""
        if resume not in ("auto", "never") and not Path(resume).is_dir():
            there = ", ".join(sorted(path.name for path in self.checkpoints.glob("step-*[0-9]"))) or "none"
            raise CheckpointError(
                "run.resume must be auto, never, or the folder of a run or of one of its checkpoints; "
                f"got {resume}, which is no folder; checkpoints there: {there}."
            )
        results, files = self._results, (self.status, self.metrics, self.checkpoints)
        with self._refusals():
            taken = results if resume != "never" else (*results, *files)
            if any(map(os.path.lexists, taken)) and not (resume != "never" and self.has_checkpoints):
                raise FileExistsError
            self._check_kinds()
            writable(self.path)
        self.check_unused()

    def _check_kinds(self) -> None:
        """Raise OSError for a link, a pipe or the like in the place of a file or folder of the run."""
        named = (self.metrics, self.report, self.page, self.status, self.parts, self.samples)
        files = (*named, Path(self._lock.lock_file))
        for path in (*files, self.adapter, self.checkpoints, self.bad_batches, self.path / "trackers"):
            kind = stat.S_ISREG if path in files else stat.S_ISDIR
            if os.path.lexists(path) and not kind(path.lstat().st_mode):
                what = "a link, which is not followed" if path.is_symlink() else "no plain file or folder"
                raise OSError(errno.ELOOP, f"{path.name} in it is {what}")

    def check_unused(self) -> None:
        """Raise CheckpointError if another process has the folder; its lock file is neither made nor changed."""
        with suppress(OSError), open(self._lock.lock_file, "rb", opener=refusing_links) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._in_use() from None

    def create(self, *, resume: str = "never") -> None:
        """Make the folder and take it. Raises CheckpointError if it holds a run already, or if another process has it,
        RecipeError if it cannot be made. The metrics of a run that ended before it saved anything are set aside."""
        self.check(resume=resume)
        with self._refusals():
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            if self.has_checkpoints or any(map(os.path.lexists, self._results)):
                raise FileExistsError  # another run has come and ended since the check
            if self.metrics.exists():
                self.metrics.replace(self.path / "metrics.earlier.jsonl")
            self.forget_ending()
            open(self.metrics, "x").close()

    def forget_ending(self) -> None:
        """Remove what says how an earlier part of the run ended: status.json, and the report that a broken compile
        contract left."""
        self.status.unlink(missing_ok=True)
        if self.has_unfinished_report:
            self.report.unlink()
            self.page.unlink(missing_ok=True)

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
    def code(self) -> int | None:
        """The exit code in status.json; None if there is no such file that can be read."""
        return self.code_and_rank[0]

    @property
    def code_and_rank(self) -> tuple[int | None, Any]:
        """The exit code in status.json and the rank to blame, likewise."""
        try:
            with open(self.status, encoding="utf-8", opener=refusing_links) as file:
                status = json.load(file)
                return int(status["code"]), status.get("rank")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None, None

    @property
    def _results(self) -> tuple[Path, ...]:
        """What only a finished run has, whether it is there or not."""
        return (self.adapter,) if self.has_unfinished_report else (self.report, self.adapter)

    @property
    def has_unfinished_report(self) -> bool:
        """Whether report.json is of a run whose compile contract broke before its end; such a run has no result."""
        with (
            suppress(OSError, ValueError, RecursionError),
            open(self.report, encoding="utf-8", opener=refusing_links) as file,
        ):
            report = json.load(file)
            return isinstance(report, dict) and "ending" in report
        return False

    @property
    def has_checkpoints(self) -> bool:
        """Whether there are finished bundles, whole or damaged."""
        return any(self.checkpoints.glob("step-*[0-9]"))

    def lock(self) -> None:
        """Take the folder for this process until `unlock` or its end. Raises CheckpointError naming the process that
        has it."""
        with self._refusals():
            try:
                self._lock.acquire()
            except Timeout:
                raise self._in_use() from None
            with open(self._lock.lock_file, "w", encoding="utf-8", opener=refusing_links) as file:
                self._locked_file = os.fstat(file.fileno())
                file.write(f"{os.getpid()} on {platform.node()}")
        self.hold()

    def _in_use(self) -> CheckpointError:
        with open(self._lock.lock_file, encoding="utf-8", errors="replace", opener=refusing_links) as file:
            holder = file.read(200) or "(its disk is full)"
        return CheckpointError(
            f"run.output_dir must not be in use; process {holder} trains in {self.path}. "
            "Wait for its end, or choose another folder."
        )

    def unlock(self) -> None:
        """Give the folder back; another one in its place is left alone, which another run may have made, and so is its
        lock file where `discard` has removed this one's."""
        if self._lock.is_locked:
            with suppress(OSError):
                self.check_in_place()
                if self._locked_file and os.path.samestat(os.lstat(self._lock.lock_file), self._locked_file):
                    os.unlink(self._lock.lock_file)
            self._lock.release(force=True)

    def free_block(self) -> bool:
        """Give a full disk the block of the lock file back: a run's status may take it. The lock stays; only whose it
        is can no longer be read. Whether there was one."""
        with suppress(OSError), open(self._lock.lock_file, "r+b", opener=refusing_links) as file:
            had = os.fstat(file.fileno()).st_size > 0
            file.truncate(0)
            return had
        return False

    def hold(self) -> None:
        """Remember which folder the path names now. It stays open, so that no later folder gets its number."""
        self._handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)

    def __del__(self) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def check_in_place(self) -> None:
        """Raise OSError if the path names another folder than when it was held, or none: it was removed, or its disk
        is gone."""
        if self._handle is not None and not os.path.samestat(self.path.stat(), os.fstat(self._handle)):
            raise OSError(errno.ESTALE, "it was removed, and another folder has its name")

    def discard(self) -> None:
        """Remove what `create` made, if nothing was measured yet; other files in the folder are the user's."""
        self.metrics.unlink()
        self.parts.unlink(missing_ok=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()


def named_folder(resume: str) -> Path | None:
    """The run folder that run.resume names, by itself or by one of its checkpoints; None for auto and never."""
    if resume in ("auto", "never"):
        return None
    path = Path(resume).absolute()
    return path.parents[1] if path.name.startswith("step-") and path.parent.name == "checkpoints" else path


def run_folder_of(path: Path) -> Path | None:
    """The folder of the run that `path` names: by itself, by a file in it, its adapter, its checkpoints, one of these
    or that one's adapter. None: it names no run."""
    for folder in (path, *path.parents[:3]):
        is_part = PARTS_OF_A_RUN.fullmatch(path.relative_to(folder).as_posix()) or (
            path.parent == folder and path.is_file()
        )
        if is_part and any((folder / mark).is_file() for mark in MARKS):
            return folder
    return None


def bundles_of(checkpoints: Path) -> list[Path]:
    """The finished checkpoints, the newest first; each may be damaged."""
    steps = {path: path.name.removeprefix(PREFIX) for path in checkpoints.glob(f"{PREFIX}*")}
    finished = (path for path, step in steps.items() if step.isdecimal() and path.is_dir() and not path.is_symlink())
    return sorted(finished, key=step_of, reverse=True)


def step_of(bundle: Path) -> int:
    """The optimizer steps that were done when a checkpoint was written."""
    return int(bundle.name.removeprefix(PREFIX))


def default_folder(recipe: str) -> str:
    """runs/<recipe>-<time>, with a counter where two runs start within a second. Absolute."""
    name = Path(recipe).name.removesuffix(".yaml")  # no stem: names of models hold dots
    base = Path.cwd() / "runs" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, count = base, 1
    while os.path.lexists(path):
        count += 1
        path = base.with_name(f"{base.name}-{count}")
    return str(path)
