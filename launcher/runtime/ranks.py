"""Who am I, how many are we, who goes first, and one record from each. torch is imported only where the group is
spoken to."""

import atexit
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from launcher.runtime.rendezvous import Rendezvous

T = TypeVar("T")

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # torchrun's; accelerate's for one process


@dataclass(frozen=True)
class RankInfo:
    """This process among the run's processes, as the launcher's environment tells it."""

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
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, usable // self.local_world_size)


def rank_info() -> RankInfo:
    """Read from the variables that torchrun and `accelerate launch` set; alone without them."""

    def number(name: str, default: int) -> int:
        return int(os.environ.get(name, default))

    world = number("WORLD_SIZE", 1)
    return RankInfo(number("RANK", 0), number("LOCAL_RANK", 0), world, number("LOCAL_WORLD_SIZE", world))


def end_with_parent() -> None:
    """Under a launcher, ask the kernel to send SIGTERM here when it dies (Linux): `accelerate launch` with one process
    would otherwise leave its trainer running. Without one the parent is a shell, which may end before its job."""
    if sys.platform == "linux" and any(name in os.environ for name in LAUNCHER_VARIABLES):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


_held: list[Any] = []  # the process group, until the interpreter ends


def hold_process_group() -> None:
    """Keep the process group, where there is one, until the interpreter ends; then let it go, last of all.

    Objects of torch may share gloo's group, as DDP's reducer does. Were theirs the last reference, its destructor would
    join gloo's threads with the GIL held while one of them waits for the GIL, to free the tensors of its last
    collective: the process never ends (torch 2.13; seen twice in ten launches with DDP). Python's own reference is
    dropped with the GIL released.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        if not _held:
            atexit.register(let_go)
        _held.append(distributed.group.WORLD)


def let_go() -> None:
    """Free what may still share the process group, then the group."""
    gc.collect()
    _held.clear()


def gather(record: Any) -> list[Any]:
    """One object from every rank, in rank order, on every rank."""
    from accelerate.utils import gather_object

    return list(gather_object([record]))


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def local_rank_0_first(here: RankInfo, work: Callable[[], T], *, wait_s: float) -> T:
    """`work` in local rank 0 of each machine; when it is done there, in the machine's other ranks.

    For work that leaves in a cache what the second to do it finds there. Needs no process group: what became of the
    first is a file in a private temporary folder. Every local rank must come here, equally often.

    Raises what `work` raises. The other ranks raise local rank 0's error (the nearest class of launcher/errors.py, the
    same message), LostRank when it has ended without a word or `wait_s` seconds are over, and DiskError when the
    folder is not this user's own.
    """
    if here.local_world_size == 1:
        return work()
    rendezvous = Rendezvous(here.local_rank, of=here.local_world_size)
    if here.local_rank:
        try:
            rendezvous.await_first(wait_s)
        finally:
            rendezvous.leave()
        return work()
    rendezvous.open()
    try:
        value = work()
    except BaseException as error:
        rendezvous.tell_failed(error)
        raise
    rendezvous.tell_done()
    return value
