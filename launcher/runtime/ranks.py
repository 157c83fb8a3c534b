"""This process's rank, and how ranks exchange and compare values. torch is imported only to use the process group."""

import atexit
import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from launcher.errors import LauncherError, RecipeError
from launcher.runtime.progress import PROGRESS

VARIABLES_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")

STARTED_S = time.monotonic()  # when this process began, nearly: the command line imports this module before torch


@dataclass(frozen=True)
class RankInfo:
    """This process among the run's processes."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def cores(self) -> int:
        """This rank's share of the cores that the process may run on, at least 1."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size)


def rank_info() -> RankInfo:
    """Read the variables that torchrun and `accelerate launch` set; without them the process is the only one.

    Raises RecipeError where they do not fit together, as those of an earlier shell may.
    """
    given = {name: os.environ[name] for name in VARIABLES_OF_RANKS if os.environ.get(name)}
    # LOCAL_RANK makes Accelerate start a process group, also for one process.
    needed = VARIABLES_OF_RANKS if "LOCAL_RANK" in given or given.get("WORLD_SIZE", "1") != "1" else ()
    try:
        world = int(given.get("WORLD_SIZE", 1))
        local_world = int(given.get("LOCAL_WORLD_SIZE", world))
        info = RankInfo(int(given.get("RANK", 0)), int(given.get("LOCAL_RANK", 0)), world, local_world)
        fit = 0 <= info.local_rank <= info.rank < world and info.local_rank < local_world <= world
        fit = fit and 0 <= int(given.get("MASTER_PORT", 0)) < 2**16
    except ValueError:
        fit = False
    if not fit or {*needed} - {*given, "LOCAL_WORLD_SIZE"}:
        found = " ".join(f"{name}={given.get(name, '(unset)')}" for name in VARIABLES_OF_RANKS)
        raise RecipeError(
            "the variables of a process launcher must be there together, as whole numbers with RANK below WORLD_SIZE "
            f"and LOCAL_RANK below LOCAL_WORLD_SIZE; found {found}.\n"
            "Remove those of an earlier shell (unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE), or start with "
            "accelerate launch."
        )
    return info


_process_group: list[Any] = []  # kept until the interpreter ends


def hold_process_group() -> None:
    """Keep a reference to the process group, if there is one, until the interpreter ends.

    Objects of torch may share gloo's group, as DDP's reducer does. If theirs were the last reference, its destructor
    would join gloo's threads with the GIL held while one of them waits for the GIL, to free the tensors of its last
    collective: the process never ends (torch 2.13; seen twice in ten launches with DDP). Python's own reference is
    dropped with the GIL released.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        if not _process_group:
            atexit.register(release_process_group)
        _process_group.append(distributed.group.WORLD)


def release_process_group() -> None:
    """Free what may still share the process group, then drop the reference that `hold_process_group` keeps."""
    gc.collect()
    _process_group.clear()


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank."""
    from accelerate.utils import gather_object

    PROGRESS.enter_collective()
    return list(gather_object([value]))


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    from accelerate.utils import broadcast_object_list

    PROGRESS.enter_collective()
    return broadcast_object_list([value])[0]


@contextmanager
def failing_together(kind: type[Exception]) -> Iterator[None]:
    """Around what every rank does: an error of this kind on one rank is raised on all, which else would wait for it."""
    own: Exception | None = None
    try:
        yield
    except kind as error:
        own = error
    for failure in filter(None, gather(own)):
        raise failure


def check_same_on_all_ranks(rule: str, digest: str, *, error: type[LauncherError], remedy: str) -> None:
    """Compare the digests of all ranks. `rule` completes "every rank must ...".

    Raises `error` on every rank where two digests differ; the message has a line for each rank.
    """
    digests = gather(digest[:16])
    if len(set(digests)) > 1:
        lines = "\n".join(f"rank {rank}: {digest}" for rank, digest in enumerate(digests))
        raise error(f"every rank must {rule}; they differ:\n{lines}\n{remedy}")
