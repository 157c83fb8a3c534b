"""Waits until every rank has come, and says who has not. torch's own rendezvous waits without a word.

The ranks meet at MASTER_ADDR:MASTER_PORT, in the store that torch uses next: the launcher's, else rank 0's. A rank that
fails before it has come says so there: the launcher of its machine ends the ranks of this machine only.
"""

import json
import os
import socket
import sys
import time
from contextlib import suppress
from typing import Any

from launcher.errors import LauncherError, LostRank, RecipeError, described, from_description
from launcher.runtime.ranks import RankInfo

SAY_AFTER_S = 15.0
CONNECT_S = 5.0
POLL_S = 0.05
TELL_S = 20.0  # for the others to come and hear that this rank has failed; their imports may take longer

_waited: list[bool] = []  # not empty: whatever ends this rank from now on, the others know of it, or wait in vain too
_ended: dict[int, Any] = {}  # by rank, this one's: the store in which it has said that it ends before all have met


def wait_for_ranks(rank_info: RankInfo, *, wait_s: float) -> Any:
    """Wait for all ranks; one of those that are here says after SAY_AFTER_S who is missing. Returns the store: keep it
    until there is a process group, since it ends with its last reference.

    Raises LostRank after `wait_s` seconds, RecipeError where rank 0 cannot open its port, and what another rank has
    told of itself (`tell_failure`).
    """
    if rank_info.world_size == 1:
        return None
    _waited.append(True)
    start, said = time.monotonic(), False
    store: Any = None
    while missing := _missing(store, rank_info.world_size):
        if store is not None and store.check([_key("failed")]):
            raise _failure(store, rank_info)
        waited_s = time.monotonic() - start
        if not said and waited_s > SAY_AFTER_S:
            said = True
            if not {*range(rank_info.rank)} - {*missing} or store is None:  # the first of those that are here
                print(
                    f"{_who(missing, rank_info)}; waiting up to data.wait_s={wait_s:g} s", file=sys.stderr, flush=True
                )
        if waited_s > wait_s:
            raise LostRank(
                f"every rank must come within data.wait_s={wait_s:g} seconds; {_who(missing, rank_info)}.\n"
                "Start them all, or remove the variables of an earlier shell (unset WORLD_SIZE RANK LOCAL_RANK)."
            )
        if store is None:
            store = _connect(rank_info)
            if store is not None:
                store.add(_key(rank_info.rank), 1)
        time.sleep(POLL_S)
    return store


def tell_failure(rank_info: RankInfo, error: LauncherError) -> None:
    """Tell the ranks that wait for this one how it has failed, if some are on other machines. Returns when all have
    ended likewise, or after TELL_S seconds: until then this rank, which may have the store, is there for those that
    come later, also where it has heard the failure itself. Does nothing once it has waited for the others and heard
    none."""
    own = rank_info.rank
    if rank_info.local_world_size == rank_info.world_size or (_waited and own not in _ended):
        return
    word = {**described(error), "rank": rank_info.rank, "host": socket.gethostname()}
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # stack traces, where the store's machine ends first
    limit = time.monotonic() + TELL_S
    with suppress(LauncherError, ImportError, RuntimeError):  # no port, no torch, no store: nobody can be told
        while time.monotonic() < limit:
            if own in _ended:
                if _ended[own].add(_key("ended"), 0) >= rank_info.world_size:
                    return
            elif (store := _connect(rank_info)) is not None:
                store.compare_set(_key("failed"), "", json.dumps(word))  # the first one stays
                _end(store, own)
            time.sleep(POLL_S)


def _end(store: Any, rank: int) -> None:
    store.add(_key("ended"), 1)
    _ended[rank] = store


def _failure(store: Any, rank_info: RankInfo) -> LauncherError:
    """The error of the rank that has failed; one rank of each machine prints it."""
    word = json.loads(store.get(_key("failed")))
    what = f"rank {word['rank']} on {word['host']} failed before the run began: {word['message']}"
    error = from_description({**word, "message": what})
    if store.add(_key(f"printed-{rank_info.rank - rank_info.local_rank}"), 1) == 1:
        error.reporter = rank_info.local_rank
    else:
        error.rank = word["rank"]
    _end(store, rank_info.rank)
    return error


def _connect(rank_info: RankInfo) -> Any:
    """The store; None while nobody has opened it."""
    from torch.distributed import DistError, TCPStore

    hosts = rank_info.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        if not hosts:  # TCPStore itself would print stack traces until it is there
            socket.create_connection((address, port), timeout=CONNECT_S).close()
        # multi_tenant: torch's rendezvous opens the store again, and gets the same server.
        return TCPStore(address, port, is_master=hosts, wait_for_workers=False, multi_tenant=hosts)
    except (OSError, DistError) as error:
        if not hosts:
            return None
        reason = str(error).splitlines()[0]
        raise RecipeError(f"MASTER_PORT must be free; {port} is not ({reason}). Choose another.") from None


def _missing(store: Any, world_size: int) -> list[int]:
    if store is None:  # where rank 0 opens it, nothing is known of the others
        return [0]
    return [rank for rank in range(world_size) if not store.add(_key(rank), 0)]


def _key(name: int | str) -> str:
    """`name`: a rank, which has come; or what is told of one."""
    return f"qlora-launcher/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{name}"


def _who(missing: list[int], rank_info: RankInfo) -> str:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    come = "" if missing == [0] else f"; {rank_info.world_size - len(missing)} of {rank_info.world_size} are there"
    return f"rank {', '.join(map(str, missing))} of {rank_info.world_size} has not come to {place}{come}"
