"""CUDA graphs: the kernels of a step are recorded once and replayed by one launch instead of thousands.

Captured work reads and writes tensors whose addresses stay the same and never waits for the device. What it returns is
of the host, and every replay returns what the capture did.
All graphs of a run share one memory pool. Nothing in the pool outlives a replay, so they may run in any order; the
largest is captured first, and the others reuse its memory.

Before the capture, the work is rehearsed twice on the capturing stream: once freely, because libraries and lazy state
need a first call, and once with every wait for the device turned into an error. What cannot be captured is thus found
while it does no harm: a capture that fails half-way leaves torch's allocator and random generator in capture mode, and
`_recover` can only partly undo that.
"""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch

from launcher.credentials import shortened
from launcher.errors import LESS_MEMORY, ContractError, MemoryExhausted, RecipeError
from launcher.recipe.schema import CompileSection

Work = Callable[[], Any]
OUT_OF_MEMORY = "out of memory"  # part of torch's message

_failed: list[Any] = []  # kept alive: torch's host allocator may still ask a failed graph for its stream


class CaptureFailed(Exception):
    """The work could not be captured, and can go on uncaptured. The message is the first line of torch's error."""


def check_graphs(compile: CompileSection, device: torch.device) -> None:
    """Raise RecipeError where the recipe requires CUDA graphs and the device is not a GPU."""
    if compile.cuda_graphs == "on" and device.type != "cuda":
        raise RecipeError(
            f"compile.cuda_graphs=on needs a CUDA device, the device is {device.type}. Use compile.cuda_graphs=auto."
        )


def outcome(failures: Sequence[str | None], *, wanted: str) -> str:
    """What the report says of the ranks' captures. `failures`: the error of each rank, None where it succeeded. With
    wanted="on" a failure is raised, as MemoryExhausted where memory ran out, else as ContractError."""
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
        """Run `work` twice on the capturing stream. Raises CaptureFailed where it waits for the device."""
        gc.collect()  # tensors of an earlier run must not be freed during a capture
        _release_caches()
        cast(Any, torch._C)._cuda_clearCublasWorkspaces()  # of the usual stream: 32 MiB on an H200
        torch.cuda.empty_cache()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                work()
                with waits_are_errors(), _as_capture_failed():
                    work()
        finally:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            _release_caches()

    def capture(self, work: Sequence[Work]) -> list[Work]:
        """Capture each of `work`; returns their replays, all of which must run on one stream. Raises CaptureFailed."""
        with _as_capture_failed():
            return [self._captured(one) for one in work]

    def _captured(self, work: Work) -> Work:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # thread_local: NCCL's watchdog queries the device from its own thread, and must not break the capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = work()
        except Exception:
            torch.cuda.set_stream(current)  # torch stays on the capturing stream when ending the capture fails
            self._recover(graph)
            raise

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """End the capture in torch's allocator, which would keep the pool, and in its random generator, which would
        refuse to draw."""
        device, native = torch.cuda.current_device(), cast(Any, torch._C)
        with suppress(RuntimeError, AttributeError):  # torch has already ended it, or has renamed these functions
            native._cuda_endAllocateToPool(device, self._pool)
            _failed.append(graph)
            native._cuda_releasePool(device, self._pool)
        with suppress(RuntimeError):
            scalar = torch.zeros((), device=self._device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(self._device)):
                scalar.zero_()  # a capture that succeeds tells the generator that capturing is over


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """Inside, an operation that waits for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype": the capture finds what it misses
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _as_capture_failed() -> Iterator[None]:
    """Turn a RuntimeError of torch into CaptureFailed."""
    try:
        yield
    except RuntimeError as error:
        raise CaptureFailed(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    """The first line of the first error in the chain: the last one only says that the capture had failed before."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    lines = str(error).strip().splitlines()
    return shortened(lines[0] if lines else type(error).__name__, 200)


def _release_caches() -> None:
    """Free what the allocator caches for one stream: another stream and the graphs' pool would need it again."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
