"""The files of a run, all in its folder: metrics.jsonl and report.json by rank 0, status.json by whoever failed."""

import json
import math
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.errors import CheckpointError, RecipeError
from launcher.records.run import EvalRecord, RunRecord, StepRecord

ECHOES = (1, 8, 130, 143)  # ends that another rank's failure may bring about


class RunFolder:
    """`run.output_dir`, or runs/<recipe>-<time>. Nothing of a run is written anywhere else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_ours = False  # until it has been created for this run: another run's folder is left alone

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def adapter_staging(self) -> Path:
        """Where the adapter is until it is proved."""
        return self.path / "adapter.part"

    def create(self) -> None:
        """Make the folder. Raises CheckpointError if it holds a run already, RecipeError if it cannot be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any((self.path / name).exists() for name in ("status.json", "report.json", "adapter")):
                raise FileExistsError
            open(self.path / "metrics.jsonl", "x").close()  # of two runs that start together one gets it
        except FileExistsError:
            raise CheckpointError(
                f"run.output_dir must not hold another run; {self.path} does. Choose another folder or remove it."
            ) from None
        except OSError as error:
            raise RecipeError(
                f"run.output_dir must be a folder that can be written; {self.path}: {error.strerror}. Choose another."
            ) from None

    def metric(self, record: StepRecord | EvalRecord) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(asdict(record))) + "\n")

    def report(self, run: RunRecord) -> None:
        """Write report.json."""
        write_json(self.path / "report.json", run.as_report())

    def status(self, *, code: int, reason: str, rank: int, step: int) -> None:
        """Write status.json; the launcher masks worker exit codes, so this is where they can be read.

        When one rank fails the others fail after it, of a closed connection or a signal: what they say never replaces
        the cause. A run that never got to its first line (codes 2 and 3) leaves no folder.
        """
        if not self.is_ours or (code in ECHOES and self._cause() not in (None, *ECHOES)):
            return
        shutil.rmtree(self.adapter_staging, ignore_errors=True)
        if code in (2, 3) and not (self.path / "metrics.jsonl").stat().st_size:
            (self.path / "metrics.jsonl").unlink()
            if not any(self.path.iterdir()):  # the user may keep other things there
                self.path.rmdir()
            return
        found = {"code": code, "reason": reason, "rank": rank, "step": step, "resumable": False}
        write_json(self.path / "status.json", found)

    def _cause(self) -> int | None:
        """The code that status.json has, None without one."""
        try:
            return int(json.loads((self.path / "status.json").read_text(encoding="utf-8"))["code"])
        except FileNotFoundError:
            return None


def default_folder(recipe: str) -> str:
    """runs/<recipe>-<time>, with a counter where two runs start within a second. Absolute."""
    name = Path(recipe).stem
    base = Path.cwd() / "runs" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidate, n = base, 1
    while candidate.exists():
        n += 1
        candidate = base.with_name(f"{base.name}-{n}")
    return str(candidate)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all: a reader never sees half a file. What is no finite number becomes null."""
    staging = path.with_name(f"{path.name}.{os.getpid()}.part")  # several ranks may report one failure
    staging.write_text(json.dumps(_finite(content), indent=2) + "\n", encoding="utf-8")
    os.replace(staging, path)


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
