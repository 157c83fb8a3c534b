"""Rows are encoded in worker processes, a chunk at a time and in order: chat templates run in Python, on one core each.

    rows -> chunks -> workers, each with an Encoder of its own -> (row, EncodedRow) in the rows' order

The first rows are encoded in this process, so a small data set starts no worker. Workers are started once, on the first
row after those; each imports transformers without torch and takes about 70 MiB.
"""

import gc
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from launcher.data.chat.encode import EncodedRow, Encoder
from launcher.data.read.rows import Row
from launcher.errors import LauncherError
from launcher.recipe.data_section import DataSection
from launcher.runtime.child_processes import exit_with_parent

T = TypeVar("T")

CHUNK_ROWS = 512  # rows sent to a worker together
CHUNK_CHARACTERS = 1 << 20  # or fewer rows with so many: a token takes a hundred bytes before it is an id
ALONE_CHARACTERS = 1 << 20  # encoded here first, about 6,000 short chats: takes as long as starting the workers (1 s)
MAX_WORKERS = 16  # more would wait for rows: one process reads them
AHEAD = 2  # chunks a worker that are read ahead


class EncoderPool:
    """Encodes rows in up to `workers` processes, or in this one if `workers` is 1."""

    def __init__(self, encoder: Encoder, *, workers: int) -> None:
        self.encoder = encoder
        self._workers = min(workers, MAX_WORKERS)
        self._characters_left = ALONE_CHARACTERS  # to encode in this process before workers start
        self._executor: ProcessPoolExecutor | None = None

    def encode(self, rows: Iterable[Row]) -> Iterator[tuple[Row, EncodedRow]]:
        """Every row with what Encoder.encode makes of it, in order.

        Raises what Encoder.encode raises, and LauncherError if a worker is killed. An error of `rows` is raised after
        the rows before it, whatever the number of workers.
        """
        chunked = chunks(rows)
        while (self._workers == 1 or self._characters_left > 0) and (chunk := next(chunked, None)):
            self._characters_left -= sum(row.characters for row in chunk)
            yield from zip(chunk, self.encoder.encode(chunk), strict=True)
        submitted = ((chunk, self._submit(chunk)) for chunk in chunked)
        for chunk, future in _read_ahead(submitted, AHEAD * self._workers):
            with _killed_worker_has_message():
                encoded = future.result()
            yield from zip(chunk, encoded, strict=True)

    def close(self) -> None:
        """End the workers, when they have finished their chunks."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def _submit(self, chunk: list[Row]) -> Future[list[EncodedRow]]:
        with _killed_worker_has_message():
            return self._start().submit(_encode_chunk, chunk)

    def _start(self) -> ProcessPoolExecutor:
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self._workers,
                mp_context=_Context(),
                initializer=_start_worker,
                initargs=(self.encoder.tokenizer, self.encoder.data, self.encoder.stop_ids),
            )
        return self._executor


def chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in order, in lists of CHUNK_ROWS rows or fewer that have CHUNK_CHARACTERS.

    An error of `rows` is raised after the rows before it.
    """
    chunk: list[Row] = []
    characters = 0
    try:
        for row in rows:
            chunk.append(row)
            characters += row.characters
            if len(chunk) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
    except Exception:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def _read_ahead(items: Iterator[T], number: int) -> Iterator[T]:
    """The items in order; `number` more are read before one is given. An error comes after the items before it."""
    waiting: deque[T] = deque()
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) > number:
                yield waiting.popleft()
    except Exception:
        yield from waiting
        raise
    yield from waiting


@contextmanager
def _killed_worker_has_message() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise LauncherError(
            "The processes that render and tokenise rows must live until the data is prepared.\n"
            "Found: one of them was killed.\nFree memory if it ran out, and start again."
        ) from error


class _Process(SpawnProcess):
    """A worker that is deaf to Ctrl-C, which reaches every process of a terminal: its parent ends it.

    The signal mask is inherited, so it holds from the start. An error of the parent while it starts a worker leaves a
    process that the executor does not know; the parent's exit ends a daemon, and would wait for another for ever. The
    parent's main module is hidden: a worker would import it, which costs time, and would run a script of the user's
    that has no `if __name__ == "__main__"` once more.
    """

    def start(self) -> None:
        mask, main = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}), sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            self.daemon = True
            super().start()
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Context(SpawnContext):
    Process = _Process


_worker_encoder: Encoder  # in a worker process


def _start_worker(tokenizer: PreTrainedTokenizerBase, data: DataSection, stop_ids: tuple[int, ...]) -> None:
    global _worker_encoder
    exit_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for every core
    _worker_encoder = Encoder(tokenizer, data=data, stop_ids=stop_ids)
    gc.freeze()  # the libraries' objects stay, and rendering leaves little garbage:
    gc.set_threshold(100_000)  # at the default of 700, collecting takes up to a sixth of the time


def _encode_chunk(rows: list[Row]) -> list[EncodedRow]:
    return _worker_encoder.encode(rows)
