"""Rank 0 answers whoever sends a state and the token; the others learn of an end at once."""

import json
import socket
import time
from typing import Any

import pytest

from launcher.runtime import rank_states
from launcher.runtime.rank_states import Hub, Link, Unanswered


@pytest.fixture
def hub() -> Any:
    made = Hub(everywhere=False)
    yield made
    made.close()


def link(hub: Hub, rank: int) -> Link:
    return Link(rank, "127.0.0.1", hub.port, hub.token)


def test_each_rank_gets_the_newest_states_of_all(hub: Hub) -> None:
    one, two = link(hub, 1), link(hub, 2)
    hub.exchange({"beat": 1})
    assert one.exchange({"beat": 5}) == {0: {"beat": 1}, 1: {"beat": 5}}
    assert two.exchange({"beat": 7}) == {0: {"beat": 1}, 1: {"beat": 5}, 2: {"beat": 7}}
    assert one.exchange({"beat": 6})[1] == {"beat": 6}
    assert hub.exchange({"beat": 2}) == {0: {"beat": 2}, 1: {"beat": 6}, 2: {"beat": 7}}


def test_a_connection_that_closes_marks_its_rank_as_gone(hub: Hub) -> None:
    one = link(hub, 1)
    one.exchange({"beat": 5})
    one.close()
    limit = time.monotonic() + 30
    while "gone" not in (seen := hub.exchange({})[1]):
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert seen == {"beat": 5, "gone": True}


def test_a_link_to_a_rank_0_that_has_ended_says_so_and_one_that_is_stopped_leaves_it_unanswered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_states, "ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = Link(1, "127.0.0.1", server.getsockname()[1], "token")
        for _ in range(2):
            with pytest.raises(Unanswered):
                other.exchange({"beat": 1})
        connection, _ = server.accept()
        sent = connection.recv(65536)
        assert sent.count(b"\n") == 1, "while an answer is due nothing is sent, which would pile up"
        connection.sendall(b'{"1": {"beat": 1}}\n')
        assert other.exchange({"beat": 2}) == {1: {"beat": 1}}
        connection.close()
        with pytest.raises(ConnectionError):
            other.exchange({"beat": 3})


@pytest.mark.parametrize(
    "sent",
    [
        json.dumps({"token": "guessed", "rank": 1, "state": {}}).encode(), b"GET / HTTP/1.1", b"\xff\xfe", b"null",
        b'{"token": 5, "rank": 1, "state": {}}',
    ],
)  # fmt: skip
def test_who_does_not_know_the_token_gets_no_answer_and_changes_nothing(hub: Hub, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", hub.port), timeout=30) as stranger:
        stranger.sendall(sent + b"\n")
        assert stranger.recv(100) == b""
    assert hub.exchange({"beat": 1}) == {0: {"beat": 1}}
