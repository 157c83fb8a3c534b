"""Work that one process of a machine does for all of its processes: preparing the data.

The first process to get a file lock works and leaves its result in a cache. The others wait for the lock, then do the
same work, which finds the result in the cache. The kernel frees the lock when its holder ends, however it ends; the
next process then works. Needs neither a process group nor torch.

    <cache>/qlora-launcher/launches/<digest>.lock    the digest names the launch
                                    <digest>.json    "process", the one that works; "outcome", once it has ended;
                                                     "at", when this was written (seconds of the machine's clock)
"""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from launcher.credentials import masked_tree
from launcher.errors import LauncherError, LostRank, described, from_description
from launcher.runtime.clock import start_ticks
from launcher.runtime.private_cache import private_cache
from launcher.runtime.ranks import STARTED_S, RankInfo

T = TypeVar("T")

LAUNCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
STALE_S = 86_400.0  # files of this age belong to a launch that has long ended

_calls = itertools.count()  # all local ranks make the same calls, so the same number means the same call


def one_rank_first(rank_info: RankInfo, work: Callable[[], T], *, wait_s: float) -> T:
    """`work()` in one process of this machine, then in its others. Every local rank must call this, equally often.

    Without a private cache folder there is nothing to share, and every process works at once; likewise where the
    folder's file system has no locks.

    Raises what `work` raises. The other ranks then raise it too, without working: the nearest class of
    launcher/errors.py and the same message, or a LauncherError that names the exception's type. Raises LostRank after
    `wait_s` seconds of waiting.
    """
    folder, unusable = private_cache("launches")
    if rank_info.local_world_size == 1 or unusable:
        return work()
    launch = folder / _launch_digest()
    state = launch.with_suffix(".json")
    try:
        lock = FileLock(launch.with_suffix(".lock")).acquire(timeout=wait_s)
    except Timeout:  # an OSError too
        raise LostRank(
            f"one process of each machine must prepare the data within data.wait_s={wait_s:g} seconds; "
            f"process {_read(state).get('process')} is still at it.\n"
            "Raise data.wait_s, or run mode=preview first: the next run reads the data from the cache."
        ) from None
    except OSError:  # ENOLCK, on some network file systems
        return work()
    with lock:
        content = _read(state)
        # What is older than this process may be another launch's, started from the same shell.
        outcome = content.get("outcome") if content and content["at"] >= STARTED_S else None
        if outcome is None:  # no process has worked yet, or one was stopped at it
            return _work_first(work, state, local_rank=rank_info.local_rank)
    if outcome:
        error = from_description(outcome)
        error.reporter = outcome["reporter"]
        raise error
    return work()


def _work_first(work: Callable[[], T], state: Path, *, local_rank: int) -> T:
    _remove_stale(state.parent)
    _write(state, process=os.getpid())
    try:
        value = work()
    except LauncherError as error:
        error.reporter = local_rank
        _write(state, outcome={**described(error), "reporter": local_rank})
        raise
    except Exception as error:  # would be the others' too, after as much work
        message = f"{type(error).__name__}: {error}"
        _write(state, outcome={"class": LauncherError.__name__, "message": message, "reporter": local_rank})
        raise
    _write(state, outcome={})
    return value


def _launch_digest() -> str:
    """The same for the processes that one launcher started, and for no others: process numbers and ports are reused,
    so the launcher's start is part of it, in ticks since boot: the time of day may be set while ranks are started."""
    started = None
    with suppress(OSError):  # the launcher may be hidden from its workers
        started = start_ticks(os.getppid())
    variables = [os.environ.get(name) for name in LAUNCH_VARIABLES]
    launch = [os.uname().nodename, os.getppid(), started, *variables, next(_calls)]
    return hashlib.sha256(json.dumps(launch).encode()).hexdigest()[:24]


def _read(state: Path) -> dict[str, Any]:
    return dict(json.loads(state.read_text())) if state.exists() else {}


def _write(state: Path, **content: Any) -> None:
    """Whole or not at all. Where this fails the others find nothing and work themselves."""
    with suppress(OSError):
        fresh = state.with_suffix(".fresh")
        fresh.write_text(json.dumps({**masked_tree(content), "at": time.monotonic()}))
        fresh.replace(state)


def _remove_stale(folder: Path) -> None:
    for file in folder.iterdir():
        with suppress(OSError):  # another launch has removed it, or holds it: a lock's file keeps its first date
            if time.time() - file.stat().st_mtime > STALE_S:
                with FileLock(file, timeout=0):
                    file.unlink()
