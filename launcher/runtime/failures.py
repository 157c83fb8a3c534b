"""Which of launcher/errors.py an exception amounts to, and the exit code and reason of every end."""

import errno
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from launcher.errors import LESS_MEMORY, DiskError, LauncherError, LostRank, MemoryExhausted, RecipeError, is_full_disk
from launcher.runtime.packages import import_failure
from launcher.runtime.ranks import RankInfo
from launcher.runtime.signals import Terminated, received_stop, stop_code_and_reason

NO_MEMORY = (  # in errors that torch raises as RuntimeError: of the CPU, C++, CUDA and NCCL, cuBLAS
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
CONNECTION = (
    "gloo/",
    "Connection closed by peer",
    "Connection was likely closed",
    "NCCL",
    "ProcessGroup",
)  # in torch's errors when a rank is gone


@contextmanager
def classified(rank_info: RankInfo, ledger: Callable[[], str] = lambda: "nothing yet") -> Iterator[None]:
    """Around a run: out of memory, a full disk and a lost rank become errors with a remedy. What a signal has broken
    is the signal's: a rank whose peer ended because of it, code that it left half done.

    `ledger` says what held the memory, by phase.
    """
    try:
        yield
    except Exception as error:
        failure = _classify(error, rank_info, ledger)
        known = failure or error
        if (stop := received_stop()) and (isinstance(known, LostRank) or not isinstance(known, LauncherError)):
            raise stop from error
        if failure:
            raise failure from error
        raise


def _classify(error: Exception, rank_info: RankInfo, ledger: Callable[[], str]) -> LauncherError | None:
    if isinstance(error, LauncherError):
        return None
    if is_out_of_memory(error):
        return MemoryExhausted(
            f"the device ran out of memory on rank {rank_info.rank}; held by phase: {ledger()}.\n{LESS_MEMORY}"
        )
    if isinstance(error, ImportError):
        return RecipeError(import_failure(error))
    if is_full_disk(error):
        file = getattr(error, "filename", None) or "a file of the run"
        return DiskError(f"the disk is full: {file} could not be written. Free space.")
    lost = isinstance(error, RuntimeError) and any(word in str(error) for word in CONNECTION)
    if lost and rank_info.world_size > 1:
        return LostRank("another rank ended first and closed the connection; its own error says why.")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the device or the host."""
    torch = sys.modules.get("torch")  # if it was not imported, the error is not its
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    of_torch = isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    return of_torch or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def code_and_reason(error: BaseException) -> tuple[int, str]:
    """The exit code of a process that this error ends, and the reason for status.json."""
    if isinstance(error, LauncherError):
        return error.code, str(error)
    if isinstance(error, GeneratorExit):  # who iterates over the run's events has left it
        return stop_code_and_reason(KeyboardInterrupt)
    if isinstance(error, KeyboardInterrupt | Terminated):
        return stop_code_and_reason(type(error), saved=str(error))
    return 1, f"{type(error).__name__}: {error}"


def free_frames(failure: BaseException, *, but: BaseException | None) -> None:
    """Clear the local variables of the frames that an error and its causes keep. A notebook holds its last error, and
    with it would hold the model. `but`: an error of before, while which is handled a run was started."""
    pending: list[BaseException | None] = [failure]
    cleared: list[BaseException | None] = [None, but]
    while pending:
        error = pending.pop()
        if error not in cleared and error is not None:
            cleared.append(error)
            traceback.clear_frames(error.__traceback__)
            pending += [error.__cause__, error.__context__]
