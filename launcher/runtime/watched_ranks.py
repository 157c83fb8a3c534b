"""What a rank knows of all ranks of its run, and what follows from it: why they have to end.

Their states come from rank_states.py. Times are this rank's own monotonic clock: machines need not agree on the time.
"""

from dataclasses import dataclass
from typing import Literal

from launcher.errors import LostRank
from launcher.runtime.rank_states import RankState

UNANSWERED_S = 5.0  # rank 0 is silent: what is known of the others is old


@dataclass(frozen=True)
class Ending:
    """How a rank ends: `code` and `reason` as in status.json; `rank` is the one to blame, `step` its last."""

    code: int
    reason: str
    rank: int
    step: int


@dataclass(frozen=True)
class Cause:
    """Why all ranks have to end. `told`: by a rank that ends; the others are found by looking at one."""

    ending: Ending
    kind: Literal["told", "gone", "stopped", "asleep"]


class WatchedRank:
    """The last state of a rank, when something was heard of it and when it was seen to move."""

    def __init__(self, state: RankState, now: float) -> None:
        self.state, self.heard_s, self.moved_s = state, now, now

    def update(self, state: RankState, now: float) -> None:
        if state["beat"] != self.state["beat"]:
            self.heard_s = now
        if state["progress"] != self.state["progress"]:
            self.moved_s = now
        self.state = state


class WatchedRanks:
    """All ranks as `own_rank` knows them. `timeout_s`: None where no rank is ever taken for stopped or asleep."""

    def __init__(self, own_rank: int, *, world_size: int, timeout_s: float | None) -> None:
        self._own_rank, self._world_size, self._timeout_s = own_rank, world_size, timeout_s
        self.own_step = 0  # the last one that this rank has ended
        self._ranks: dict[int, WatchedRank] = {}
        self._answered_s = self._began_s = 0.0

    def update(self, states: dict[int, RankState], now: float) -> None:
        """Rank 0 has answered with these states."""
        self._began_s = self._began_s or now
        self._answered_s = now
        for rank, state in states.items():
            self._ranks.setdefault(rank, WatchedRank(state, now)).update(state, now)

    def count_anew(self, now: float) -> None:
        """Forget for how long ranks were silent or stood still: nobody has looked."""
        self._answered_s = self._began_s = now
        for watched in self._ranks.values():
            watched.heard_s = watched.moved_s = now

    def state_of(self, rank: int) -> RankState:
        """Empty where nothing was heard of it yet."""
        return self._ranks[rank].state if rank in self._ranks else {}

    def set_gone(self, rank: int) -> None:
        if rank in self._ranks:
            self._ranks[rank].state = {**self._ranks[rank].state, "gone": True}

    def all_told(self) -> bool:
        """Whether every other rank has ended, or has told how it does. One that has not spoken yet has not."""
        states = [watched.state for rank, watched in self._ranks.items() if rank != self._own_rank]
        return len(states) == self._world_size - 1 and all(state.get("gone") or state["ending"] for state in states)

    def cause(self, now: float) -> Cause | None:
        """Why all ranks have to end; None if they do not."""
        others = {rank: watched for rank, watched in sorted(self._ranks.items()) if rank != self._own_rank}
        endings = [Ending(**watched.state["ending"]) for watched in others.values() if watched.state["ending"]]
        for ending in endings:
            if ending.code:
                return Cause(ending, "told")
        for rank, watched in others.items():
            if watched.state.get("gone") and not watched.state["ending"]:
                what = "ended without a word: it was killed, or crashed (`dmesg` says so if its machine lacked memory)"
                return Cause(self._blamed(rank, what), "gone")
        if self._timeout_s is None or endings:  # after a good ending there is nothing to wait for
            return None
        return self._stopped(others, now, self._timeout_s) or self._asleep(now, self._timeout_s)

    def _stopped(self, others: dict[int, WatchedRank], now: float, timeout_s: float) -> Cause | None:
        never = {rank: self._began_s for rank in range(self._world_size) if rank not in self._ranks}
        heard_s = never | {rank: watched.heard_s for rank, watched in others.items()}
        if now - self._answered_s > UNANSWERED_S:
            heard_s = {0: self._answered_s} if 0 in others else {}
        for rank, since_s in heard_s.items():
            if now - since_s > timeout_s:
                what = f"was silent for run.timeout={timeout_s:g}s: it is stopped, or its machine out of reach"
                return Cause(self._blamed(rank, what), "stopped")
        return None

    def _asleep(self, now: float, timeout_s: float) -> Cause | None:
        """The rank behind the others, once all have stood still for so long: they wait for it. Where nobody is behind,
        the devices are at work."""
        progress = {rank: watched.state["progress"] for rank, watched in sorted(self._ranks.items())}
        if len(progress) < self._world_size or any(now - w.moved_s <= timeout_s for w in self._ranks.values()):
            return None
        behind = min(progress, key=lambda rank: tuple(progress[rank]))
        if progress[behind] == max(progress.values()) or not self.state_of(behind)["timed"]:
            return None
        what = (
            f"kept the others waiting for run.timeout={timeout_s:g}s: it sleeps, or a step takes longer than that "
            "(then raise run.timeout)"
        )
        return Cause(self._blamed(behind, what), "asleep")

    def _blamed(self, rank: int, what: str) -> Ending:
        """Its own word may be older than its last step: no rank ends a step without the others."""
        state = self.state_of(rank)
        step = max(self.own_step, *(watched.state["step"] for watched in self._ranks.values()))
        place = f"It was process {state['pid']} on {state['host']}" if state else "It never spoke"
        place += f", its last step {step}."
        return Ending(LostRank.code, f"rank {rank} {what}. {place}", rank, step)
