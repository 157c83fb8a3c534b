"""CUDA graphs: work is recorded once and then replayed by one launch, where the host had thousands to make.

What is captured reads and writes tensors that stay where they are, must not wait for the device, and returns nothing.
All graphs of a run share one memory pool: nothing in it outlives a replay, so they may run in any order. The largest
is captured first, and the others fit into what it left.

A rehearsal on the capturing stream comes before: once freely, as libraries and lazily made state want, and once with
every wait for the device an error. So that what cannot be captured is found while nothing is broken by it: a capture
that fails half-way leaves torch's allocator and generator in capture, which `_recover` puts right as far as it can.
"""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch

from launcher.errors import LESS_MEMORY, ContractError, MemoryExhausted, RecipeError
from launcher.recipe.schema import CompileSection

Work = Callable[[], None]
OUT_OF_MEMORY = "out of memory"  # in what torch says of it

_failed: list[Any] = []  # torch's host allocator may still ask a failed graph which stream it captured


class CaptureFailed(Exception):
    """The message is the first line of what torch raised; nothing was replaced, all can go on uncaptured."""


def check_graphs(compile: CompileSection, device: torch.device) -> None:
    """Raise RecipeError where the recipe insists on CUDA graphs and the device has none."""
    if compile.cuda_graphs == "on" and device.type != "cuda":
        raise RecipeError(
            f"compile.cuda_graphs=on needs a CUDA device, the device is {device.type}. Use compile.cuda_graphs=auto."
        )


def outcome(failures: Sequence[str | None], *, wanted: str) -> str:
    """What the report says of the ranks' captures, None where one succeeded. Raises ContractError where wanted is "on"
    and one did not."""
    failed = {rank: failure for rank, failure in enumerate(failures) if failure is not None}
    if not failed:
        return "on"
    first, why = next(iter(failed.items()))
    where = "" if len(failures) == 1 else f" on {len(failed)} of {len(failures)} ranks, rank {first}"
    if wanted == "on" and OUT_OF_MEMORY in why:
        raise MemoryExhausted(
            f"compile.cuda_graphs=on: the step must fit while it is captured{where}: {why}\n{LESS_MEMORY}"
        )
    if wanted == "on":
        raise ContractError(
            f"compile.cuda_graphs=on: the whole step must be captured; it failed{where}: {why}\n"
            "Take out what waits for the device, or use compile.cuda_graphs=auto, which goes on uncaptured."
        )
    return f"off (capture failed{where}: {why})"


class Graphs:
    """The captured graphs of one process on one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def rehearse(self, work: Work) -> None:
        """Run `work` twice on the capturing stream. Raises CaptureFailed when it waits for the device."""
        gc.collect()  # an earlier run's tensors must not be freed in the midst of a capture
        _release_caches()
        cast(Any, torch._C)._cuda_clearCublasWorkspaces()  # of the stream that is left: 32 MiB on an H200
        torch.cuda.empty_cache()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                work()
                with waits_are_errors(), _failures_named():
                    work()
        finally:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            _release_caches()

    def capture(self, work: Sequence[Work]) -> list[Work]:
        """The replay of each of `work`. Raises CaptureFailed; every replay must run on one stream."""
        with _failures_named():
            return [self._captured(one) for one in work]

    def _captured(self, work: Work) -> Work:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # thread_local: what NCCL's watchdog asks of the device in its own thread is no part of the capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        except Exception:
            torch.cuda.set_stream(current)  # torch leaves it at the capturing one when ending the capture fails
            self._recover(graph)
            raise
        replay: Work = graph.replay
        return replay

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """End what torch has not: its allocator would keep the pool, its generator refuse random numbers."""
        device, native = torch.cuda.current_device(), cast(Any, torch._C)
        with suppress(RuntimeError, AttributeError):  # torch has ended it by itself, or calls it otherwise
            native._cuda_endAllocateToPool(device, self._pool)
            _failed.append(graph)
            native._cuda_releasePool(device, self._pool)
        with suppress(RuntimeError):
            something = torch.zeros((), device=self._device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(self._device)):
                something.zero_()  # a capture that succeeds tells the generator that capturing is over


@contextmanager
def waits_are_errors() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype: what it does not see, the capture does
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _failures_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CaptureFailed(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    """Of the first error: that of ending a capture only says that there was one before."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def _release_caches() -> None:
    """What calls needed on one stream is needed again on another, and in the graphs' pool: do not hold it twice."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
