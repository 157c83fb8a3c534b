"""Waits until every rank has come, and says who has not. torch's own rendezvous waits without a word.

The ranks meet at MASTER_ADDR:MASTER_PORT, in the store that torch uses next: the launcher's, else rank 0's.
"""

import os
import socket
import sys
import time
from typing import Any

from launcher.errors import LostRank, RecipeError
from launcher.runtime.ranks import RankInfo

SAY_AFTER_S = 15.0
CONNECT_S = 5.0
POLL_S = 0.05


def wait_for_ranks(rank_info: RankInfo, *, wait_s: float) -> Any:
    """Wait for all ranks; one of those that are here says after SAY_AFTER_S who is missing. Returns the store: keep it
    until there is a process group, since it ends with its last reference.

    Raises LostRank after `wait_s` seconds, RecipeError where rank 0 cannot open its port.
    """
    if rank_info.world_size == 1:
        return None
    start, said = time.monotonic(), False
    store: Any = None
    while missing := _missing(store, rank_info.world_size):
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
        store = store or _connect(rank_info)
        time.sleep(POLL_S)
    return store


def _connect(rank_info: RankInfo) -> Any:
    """The store, in which this rank is now noted; None while nobody has opened it."""
    from torch.distributed import DistError, TCPStore

    hosts = rank_info.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        if not hosts:  # TCPStore itself would print stack traces until it is there
            socket.create_connection((address, port), timeout=CONNECT_S).close()
        # multi_tenant: torch's rendezvous opens the store again, and gets the same server.
        store = TCPStore(address, port, is_master=hosts, wait_for_workers=False, multi_tenant=hosts)
        store.add(_key(rank_info.rank), 1)
        return store
    except (OSError, DistError) as error:
        if not hosts:
            return None
        reason = str(error).splitlines()[0]
        raise RecipeError(f"MASTER_PORT must be free; {port} is not ({reason}). Choose another.") from None


def _missing(store: Any, world_size: int) -> list[int]:
    if store is None:  # where rank 0 opens it, nothing is known of the others
        return [0]
    return [rank for rank in range(world_size) if not store.add(_key(rank), 0)]


def _key(rank: int) -> str:
    return f"qlora-launcher/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{rank}"


def _who(missing: list[int], rank_info: RankInfo) -> str:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    come = "" if missing == [0] else f"; {rank_info.world_size - len(missing)} of {rank_info.world_size} are there"
    return f"rank {', '.join(map(str, missing))} of {rank_info.world_size} has not come to {place}{come}"
