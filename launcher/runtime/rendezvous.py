"""Where the local ranks of one launch meet before there is a process group: a private folder in the temporary one.

    qlora-launcher-<uid>-<digest>/     0700; digest of the launcher's process (number and start) and of its variables
        state                          local rank 0's: its process, and "working", "done" or "failed" with the error
        left-<local rank>              this rank needs the folder no more; the last to leave removes it

A launch that is killed may leave its folder. No other takes it for its own: the launcher's process is another, and the
state of a process that is gone is not believed. Stdlib and psutil only.
"""

import hashlib
import itertools
import json
import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher import errors
from launcher.errors import DiskError, LauncherError, LostRank

POLL_S = 0.05
FAREWELL_S = 30.0  # local rank 0 stays at most this long until the others have read its word: they believe the living
STOPPED_S = 1.0  # the same, for one that was interrupted

_opened = itertools.count()  # by this process; the local ranks count alike


class Rendezvous:
    """One local rank's hold on the folder."""

    def __init__(self, local_rank: int, *, of: int) -> None:
        self.local_rank, self.ranks = local_rank, of
        names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        launch = [os.uname().nodename, os.getppid(), _began(os.getppid()), *(os.environ.get(name) for name in names)]
        digest = hashlib.sha256(json.dumps([launch, next(_opened)]).encode()).hexdigest()
        self.folder = Path(tempfile.gettempdir()) / f"qlora-launcher-{os.getuid()}-{digest[:24]}"

    def open(self) -> None:
        """Local rank 0's: make the folder, anew if a launch of the same name was killed in the middle."""
        try:
            if self._is_there():
                shutil.rmtree(self.folder)
            self.folder.mkdir(mode=0o700)
        except OSError as error:
            raise self._unwritable(error) from None
        self._write({"what": "working"})

    def tell_done(self) -> None:
        """Local rank 0's. Raises DiskError: better an end than others who wait."""
        self._write({"what": "done"})
        self.leave(farewell_s=FAREWELL_S)

    def tell_failed(self, error: BaseException) -> None:
        """Local rank 0's. Gives the others time to read it: the launcher ends them when this process ends."""
        with suppress(DiskError):  # the others then see this process end
            self._write({"what": "failed", **_as_message(error)})
        self.leave(farewell_s=FAREWELL_S if isinstance(error, Exception) else STOPPED_S)

    def await_first(self, wait_s: float) -> None:
        """Return when local rank 0 is done. Raises as local_rank_0_first says."""
        deadline, met = time.monotonic() + wait_s, None
        while True:
            state = self._read()
            # Only the living are believed: whatever a killed launch has left was written by a process that is gone.
            if state and _is_sibling(state["pid"]):
                met = state["pid"]
                if state["what"] == "done":
                    return
                if state["what"] == "failed":
                    raise getattr(errors, state["class"])(state["message"])
            elif met:
                with suppress(OSError):
                    self._mark_left(0)  # in its stead
                raise _lost(met)
            if time.monotonic() > deadline:
                raise _too_late(met, wait_s)
            time.sleep(POLL_S)

    def leave(self, *, farewell_s: float = 0.0) -> None:
        """Say that this rank needs the folder no more; the last removes it. Waits up to `farewell_s` to be the last."""
        with suppress(OSError):  # not there, or removed by another who was last
            self._mark_left(self.local_rank)
            deadline = time.monotonic() + farewell_s
            while not (last := self._all_left()) and time.monotonic() < deadline:
                time.sleep(POLL_S)
            if last:
                shutil.rmtree(self.folder, ignore_errors=True)

    def _mark_left(self, local_rank: int) -> None:
        (self.folder / f"left-{local_rank}").touch(mode=0o600)

    def _all_left(self) -> bool:
        return sum(name.startswith("left-") for name in os.listdir(self.folder)) == self.ranks

    def _is_there(self) -> bool:
        """Raises DiskError when the folder is there and not our own: anybody can make one of that name in /tmp."""
        try:
            found = os.lstat(self.folder)
        except FileNotFoundError:
            return False
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700:
            return True
        raise DiskError(
            f"the folder {self.folder} must be this user's own and private (0700); somebody else has made it.\n"
            "Remove it, or set TMPDIR to another folder."
        )

    def _write(self, state: dict[str, Any]) -> None:
        fresh = self.folder / "fresh"
        try:
            fresh.write_text(json.dumps({"pid": os.getpid(), **state}))
            fresh.replace(self.folder / "state")
        except OSError as error:
            raise self._unwritable(error) from None

    def _read(self) -> dict[str, Any] | None:
        if not self._is_there():
            return None
        with suppress(FileNotFoundError):
            state: dict[str, Any] = json.loads((self.folder / "state").read_text())
            return state
        return None

    def _unwritable(self, error: OSError) -> DiskError:
        return DiskError(
            f"local rank 0 must be able to write into {self.folder}: {error.strerror}.\n"
            "Free space there, or set TMPDIR to another folder."
        )


def _as_message(error: BaseException) -> dict[str, str]:
    """An error as the other ranks raise it: its nearest class among ours, and its message."""
    if isinstance(error, LauncherError):
        ours = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        return {"class": ours.__name__, "message": str(error)}
    if isinstance(error, Exception):
        return {"class": "LauncherError", "message": f"{type(error).__name__}: {error}"}
    return {"class": "LostRank", "message": f"local rank 0 was stopped ({type(error).__name__}) before it was done."}


def _lost(process: int) -> LostRank:
    return LostRank(
        f"local rank 0 must prepare the data for the others; its process {process} ended before it was done.\n"
        "Its own error says why; without one it was killed: see the system's log, and give it more memory."
    )


def _too_late(process: int | None, wait_s: float) -> LostRank:
    found = f"its process {process} is still at it" if process else "it has not begun, or another program started it"
    return LostRank(
        f"local rank 0 must prepare the data within data.wait_s={wait_s:g} seconds; {found}.\n"
        "Raise data.wait_s, or run mode=preview first: the next run reads the data from the cache."
    )


def _began(pid: int) -> str:
    """When a process was started, the same for all who ask: a wall time is not, where the clock is being set."""
    with suppress(OSError):  # elsewhere than on Linux
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    import psutil

    try:
        return str(psutil.Process(pid).create_time())
    except psutil.Error:  # another user's, and hidden
        return ""


def _is_sibling(pid: int) -> bool:
    """Whether a process of this number lives and was started by the same launcher: a number is used again."""
    import psutil

    try:
        process = psutil.Process(pid)
        return bool(process.ppid() == os.getppid() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
