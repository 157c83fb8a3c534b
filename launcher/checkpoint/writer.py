"""Writes the checkpoints of a run behind its training, in a thread, one at a time."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.checkpoint.bundle import State, rotate, write_bundle


class BundleWriter:
    """Rank 0's. `save_adapter(folder, state)` writes the adapter of a state in PEFT's layout."""

    def __init__(self, checkpoints: Path, *, keep: int, save_adapter: Callable[[Path, State], None]) -> None:
        self._checkpoints, self._keep, self._save_adapter = checkpoints, keep, save_adapter
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Any] | None = None

    def write(self, state: State, *, step: int, eval_losses: Mapping[int, float], wait: Callable[[], None]) -> None:
        """Begin to write the bundle of `step`; the one before it has been finished. `wait` returns when the tensors of
        `state` may be read; nobody may change them until `finish`. `eval_losses`, by step, say which bundle is kept as
        the best."""
        assert self._writing is None, "one bundle is written at a time"
        self._writing = self._thread.submit(self._write, state, step, eval_losses, wait)

    def check(self) -> None:
        """Raise the error of the last write if it has failed by now."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the write that goes on. Raises its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Let the write that goes on come to its end, and the thread too; an error stays unsaid."""
        with suppress(Exception):
            self.finish()
        self._thread.shutdown()

    def _write(self, state: State, step: int, eval_losses: Mapping[int, float], wait: Callable[[], None]) -> None:
        wait()
        write_bundle(self._checkpoints, state, step=step, adapter=lambda folder: self._save_adapter(folder, state))
        with suppress(OSError):  # as of a file that is open on NFS: the next rotation, or the next start, tries again
            rotate(self._checkpoints, keep=self._keep, eval_losses=eval_losses)
