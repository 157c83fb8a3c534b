"""Every rank's state, on every rank: rank 0 answers whoever sends it a state with those of all.

Not torch's TCPStore: its requests wait for a server whose process is stopped until it goes on (timeout or not), it
prints a C++ stack trace when that process is gone, and it cannot tell that a client is. Here every rank keeps a
connection to rank 0. The kernel closes it when a process ends, however that is; so the others know at once.

    rank n ── {"token", "rank", "state"} ─► rank 0      one line of JSON each
           ◄─ {"0": state, "1": state, …} ──
"""

import json
import secrets
import socket
from contextlib import suppress
from threading import Lock, Thread
from typing import Any, Protocol

RankState = dict[str, Any]  # JSON values; "beat", which counts up, and "gone" once the connection was closed

ANSWER_S = 2.0  # rank 0 answers sooner, unless it is stopped
LINK_S = 20.0
MAX_LINE_BYTES = 2**20  # of a line


class Unanswered(Exception):
    """Rank 0 is there, but gave no answer yet."""


class Exchange(Protocol):
    """One rank's end of it."""

    def exchange(self, state: RankState) -> dict[int, RankState]:
        """Leave this rank's state; the newest of all ranks, by rank. Raises Unanswered, and ConnectionError once rank 0
        has ended."""
        ...

    def close(self) -> None: ...


class Hub:
    """Rank 0's end; the others are told `port` and `token`. `everywhere`: they may be on other machines."""

    def __init__(self, *, everywhere: bool) -> None:
        self.token = secrets.token_hex(16)
        self._states: dict[int, RankState] = {}
        self._lock = Lock()
        dual: dict[str, Any] = {}
        if everywhere and socket.has_dualstack_ipv6():
            dual = {"family": socket.AF_INET6, "dualstack_ipv6": True}
        self._server = socket.create_server(("" if everywhere else "127.0.0.1", 0), backlog=128, **dual)
        self.port = int(self._server.getsockname()[1])
        Thread(target=self._accept, daemon=True, name="heartbeat").start()

    def exchange(self, state: RankState) -> dict[int, RankState]:
        with self._lock:
            self._states[0] = state
            return dict(self._states)

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            Thread(target=self._serve, args=[connection], daemon=True, name="heartbeat").start()

    def _serve(self, connection: socket.socket) -> None:
        """Answer one rank until it ends. Who does not know the token gets no answer."""
        rank: int | None = None
        with suppress(OSError, ValueError, KeyError, TypeError), connection, connection.makefile("rb") as lines:
            while line := lines.readline(MAX_LINE_BYTES):
                message = json.loads(line)
                if not secrets.compare_digest(message["token"], self.token):
                    return
                rank = int(message["rank"])
                with self._lock:
                    self._states[rank] = message["state"]
                    answer = json.dumps(self._states)
                connection.sendall(answer.encode() + b"\n")
        if rank is not None:
            with self._lock:
                self._states[rank] = {**self._states[rank], "gone": True}


class Link:
    """Another rank's end, connected to rank 0 at `host` and `port`. Raises OSError if that cannot be reached."""

    def __init__(self, rank: int, host: str, port: int, token: str) -> None:
        self._rank, self._token = rank, token
        self._socket = socket.create_connection((host, port), timeout=LINK_S)
        self._socket.settimeout(ANSWER_S)
        self._received = b""
        self._waiting = False  # for the answer to what was sent last

    def exchange(self, state: RankState) -> dict[int, RankState]:
        try:
            if not self._waiting:
                message = json.dumps({"token": self._token, "rank": self._rank, "state": state})
                self._socket.sendall(message.encode() + b"\n")
                self._waiting = True
            while b"\n" not in self._received:
                piece = self._socket.recv(65536)
                if not piece:
                    raise ConnectionResetError("rank 0 has ended")
                self._received += piece
        except TimeoutError:
            raise Unanswered from None
        except OSError as error:  # a route that is gone, too
            raise ConnectionResetError(str(error)) from error
        line, _, self._received = self._received.partition(b"\n")
        self._waiting = False
        return {int(rank): other for rank, other in json.loads(line).items()}

    def close(self) -> None:
        self._socket.close()
