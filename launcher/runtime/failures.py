"""Which of launcher/errors.py an exception amounts to, and the exit code and reason of every end."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from launcher.errors import LESS_MEMORY, DiskError, LauncherError, LostRank, MemoryExhausted, RecipeError, is_full_disk
from launcher.runtime.packages import import_failure
from launcher.runtime.ranks import RankInfo
from launcher.runtime.signals import Terminated

CONNECTION = ("gloo/", "Connection closed by peer", "NCCL", "ProcessGroup")  # in torch's errors when a rank is gone


@contextmanager
def classified(rank_info: RankInfo, ledger: Callable[[], str] = lambda: "nothing yet") -> Iterator[None]:
    """Around a run: out of memory, a full disk and a lost rank become errors with a remedy.

    `ledger` says what held the memory, by phase.
    """
    try:
        yield
    except Exception as error:
        if failure := _classify(error, rank_info, ledger):
            raise failure from error
        raise


def _classify(error: Exception, rank_info: RankInfo, ledger: Callable[[], str]) -> LauncherError | None:
    torch = sys.modules.get("torch")  # if it was not imported, the error is not its
    if torch and isinstance(error, torch.OutOfMemoryError):
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


def code_and_reason(error: BaseException) -> tuple[int, str]:
    """The exit code of a process that this error ends, and the reason for status.json."""
    if isinstance(error, LauncherError):
        return error.code, str(error)
    saved = str(error) or "nothing was saved since the last checkpoint"
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, f"interrupted; {saved}"
    if isinstance(error, Terminated):
        return 128 + signal.SIGTERM, f"terminated; {saved}"
    return 1, f"{type(error).__name__}: {error}"
