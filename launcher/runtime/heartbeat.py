"""Ends all ranks of a run when one of them fails, is killed, is stopped or sleeps.

Without it the others wait for that rank in a collective: under NCCL for ten minutes, and where no signal reaches them.
A thread of every rank tells the others its state and looks at theirs (rank_states.py); from that follows why all have
to end, with one cause for all of them (watched_ranks.py):

    told      a rank fails, and says how
    gone      its connection was closed without a word
    stopped   nothing was heard of it for run.timeout
    asleep    its thread speaks, but in the training loop all have stood still for run.timeout, and it is behind

A main thread that is met by an error then ends with that cause in place of the error (`first_cause`). One that hangs is
ended by the thread, with its process. A watcher that was itself stopped, as by Ctrl-Z, begins to count anew.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Event as Flag
from threading import Thread

from launcher.errors import LESS_TELLING, SHARED_CODES, LauncherError, LostRank
from launcher.records.run import Event, RunOpened, StepRecord
from launcher.runtime.failures import code_and_reason
from launcher.runtime.progress import PROGRESS
from launcher.runtime.rank_states import Exchange, Hub, Link, RankState, Unanswered
from launcher.runtime.ranks import RankInfo, broadcast
from launcher.runtime.watched_ranks import Cause, Ending, WatchedRanks

LOOK_S = 0.5  # between two looks; more where there are more than 16 ranks
STOPPED_S = 5.0  # between two looks: the watcher itself was stopped
BY_ITSELF_S = 3.0  # for a main thread to end by itself
SAVE_S = 5.0  # for files that are being written
LOST_CAUSE_S = 5.0  # how long a LostRank waits for the cause of the loss
CAUSE_S = 1.5  # how long other errors wait that may follow from another rank's end
LEAVE_S = 5.0  # how long rank 0 waits until the others have read its last word


class EndedBy(LostRank):
    """How another rank ended, which ends this one too."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.reason, step=ending.step)
        self.code, self.rank = ending.code, ending.rank


class Heartbeat:
    """A sink of a run's events, on every rank; idle where there is only one.

    A thread calls `on_lost(ending, told)` before another rank's end ends this one; `told`: that rank has said so.
    `saving` is asked whether files are being written.
    """

    def __init__(
        self,
        rank_info: RankInfo,
        *,
        timeout_s: float | None,
        on_lost: Callable[[Ending, bool], None],
        saving: Callable[[], bool],
    ) -> None:
        self._info, self._on_lost, self._saving = rank_info, on_lost, saving
        self._ranks = WatchedRanks(rank_info.rank, world_size=rank_info.world_size, timeout_s=timeout_s)
        self._look_s = max(LOOK_S, rank_info.world_size / 32)
        self._thread: Thread | None = None
        self._beats = 0
        self._cause: Ending | None = None  # once it is recorded
        self._ending: Ending | None = None  # this rank's, as the others are told
        self._ends_by_itself, self._closed = Flag(), Flag()

    def show(self, event: Event) -> None:
        if isinstance(event, RunOpened):
            self._ranks.own_step = event.step
            self._start()
        elif isinstance(event, StepRecord):
            self._ranks.own_step = event.step

    def first_cause(self, failure: BaseException) -> BaseException:
        """What this rank ends with: `failure`, or an EndedBy where that may follow from another rank's end. The other
        ranks are told."""
        if self._thread is None:
            return failure
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from the process launcher: it ends the others after the first
        code, reason = code_and_reason(failure)
        agreed = not isinstance(failure, Exception) and bool(str(failure))  # the stop of all ranks after one step
        follows = code in LESS_TELLING and not agreed  # perhaps
        if follows:
            limit = time.monotonic() + (LOST_CAUSE_S if code == LostRank.code else CAUSE_S)
            while self._cause is None and time.monotonic() < limit:
                time.sleep(LOOK_S / 10)
        self._ends_by_itself.set()
        if follows and self._cause and (self._cause.code != code or code == LostRank.code):
            return EndedBy(self._cause)
        step = getattr(failure, "step", None) or self._ranks.own_step
        self._ending = self._ending or Ending(code, reason, self._info.rank, step)
        if isinstance(failure, LauncherError) and code in SHARED_CODES and not self._printed_by_another(code):
            failure.reporter = self._info.local_rank
        return failure

    def _printed_by_another(self, code: int) -> bool:
        """Whether the first rank of this machine, which prints what all ranks find, ends with this code too."""
        first, limit = self._info.rank - self._info.local_rank, time.monotonic() + CAUSE_S
        while self._info.local_rank and time.monotonic() < limit:
            ending = self._ranks.state_of(first).get("ending")
            if ending and (ending["code"], ending["rank"]) == (code, first):
                return True
            time.sleep(LOOK_S / 10)
        return False

    def close(self) -> None:
        """Say the last word to the others: code 0 if there was none before. On rank 0, wait until they have read it."""
        if self._thread is not None:
            self._ends_by_itself.set()
            self._ending = self._ending or Ending(0, "done", self._info.rank, self._ranks.own_step)
            self._closed.set()
            self._thread.join(2 * LEAVE_S)

    def _start(self) -> None:
        """All ranks do this at once: rank 0 tells the others where it listens."""
        info = self._info
        if info.world_size == 1:
            return
        elsewhere = info.local_world_size < info.world_size  # are some of the ranks
        hub = Hub(everywhere=elsewhere) if info.is_main else None
        port, token = broadcast((hub.port, hub.token) if hub else None)
        host = os.environ["MASTER_ADDR"] if elsewhere else "127.0.0.1"
        try:
            exchange: Exchange = hub or Link(info.rank, host, port, token)
        except OSError as error:
            raise LostRank(
                f"every rank must reach rank 0; rank {info.rank} on {socket.gethostname()} cannot: {host}:{port}, "
                f"{error}. Let the machines connect to each other on every port; NCCL and gloo need that too."
            ) from None
        self._look(exchange)  # from now on the others know that this rank is there, and would miss it
        self._thread = Thread(target=self._watch, args=[exchange], daemon=True, name="heartbeat")
        self._thread.start()

    def _watch(self, exchange: Exchange) -> None:
        looked_s = time.monotonic()
        while not self._closed.is_set():
            self._look(exchange)
            now = time.monotonic()
            if now - looked_s > STOPPED_S:
                self._ranks.count_anew(now)
            looked_s = now
            if not self._ends_by_itself.is_set() and (cause := self._ranks.cause(now)):
                self._end_with(cause, exchange)
            self._closed.wait(self._look_s)
        limit = time.monotonic() + LEAVE_S
        self._look(exchange)
        while self._info.is_main and not self._ranks.all_told() and time.monotonic() < limit:
            time.sleep(LOOK_S / 5)
            self._look(exchange)
        exchange.close()

    def _look(self, exchange: Exchange) -> None:
        """Tell this rank's state and take in the others'."""
        self._beats += 1
        state: RankState = {
            "beat": self._beats,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "step": self._ranks.own_step,
            "progress": [PROGRESS.collectives, PROGRESS.micro_batches],
            "timed": PROGRESS.timed,
            "ending": asdict(self._ending) if self._ending else None,
        }
        try:
            self._ranks.update(exchange.exchange(state), time.monotonic())
        except Unanswered:
            pass
        except ConnectionError:
            self._ranks.set_gone(0)

    def _end_with(self, cause: Cause, exchange: Exchange) -> None:
        """Record the cause; then end the process, unless the main thread does that by itself."""
        ending, start = cause.ending, time.monotonic()
        self._ending = ending
        self._look(exchange)  # so that the others do not take it for one that was killed, when it is
        self._on_lost(ending, cause.kind == "told")
        self._cause = ending
        if cause.kind == "stopped":  # it would ignore SIGTERM, and the others may hang until its connections close
            self._kill(ending.rank)
        wait_s = 2 * LOOK_S if ending.rank == self._info.rank else BY_ITSELF_S  # it is asleep, but the others must hear
        while (past_s := time.monotonic() - start) < wait_s or (self._saving() and past_s < SAVE_S):
            if self._ends_by_itself.wait(LOOK_S / 5):
                return
            self._look(exchange)
        self._kill(ending.rank)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(ending.code)

    def _kill(self, rank: int) -> None:
        """End a rank that stands still on this machine. A process that is stopped takes no other signal."""
        state = self._ranks.state_of(rank)
        here = rank != self._info.rank and state.get("machine") == _machine() and not state.get("gone")
        if here and not state["ending"]:
            with suppress(OSError):
                os.kill(state["pid"], signal.SIGKILL)


def _machine() -> str:
    """Names what process numbers are valid in: the same for processes that see each other. Hosts may share a name."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return f"{socket.gethostname()} {os.getpid()}"  # nobody else's: nothing is killed
