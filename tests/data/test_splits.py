"""Which rows validate, and how often a weighted source's rows are repeated."""

import hashlib
import json

import numpy as np
import pytest

from launcher.data.read.rows import Conversation, Message, PlainText
from launcher.data.splits import digest, held_out, weighted


def digests(*names: str, seed: int = 0) -> list[bytes]:
    return [digest(PlainText(name, where=f"f:{i}"), seed=seed) for i, name in enumerate(names)]


def test_a_digest_is_of_the_rows_content_as_json_and_of_the_seed():
    odd = 'a "b", ["c"]\\ \n \x00 é 😀 \ud800'
    conversation = Conversation((Message("user", odd), Message("assistant", "")), "f:1")
    for row, content in ((conversation, [["user", odd], ["assistant", ""]]), (PlainText(odd, "f:2"), odd)):
        expected = hashlib.blake2b(json.dumps(content).encode(), digest_size=16, salt=(7).to_bytes(8, "little"))
        assert digest(row, seed=7) == expected.digest() != digest(row, seed=8)


def test_rows_that_differ_in_surrounding_whitespace_are_the_same_row():
    def turns(question, answer):
        return Conversation((Message("user", question), Message("assistant", answer)), "f:1")

    for row, *same in (
        (PlainText("a b", "f:1"), PlainText("a b \n", "f:1"), PlainText("\ta b", "f:1")),
        (PlainText("ab", "f:1"), PlainText("ab", "f:1", answer=1), PlainText(" ab\n", "f:1", answer=2)),
        (PlainText("a\nb", "f:1"), PlainText("a\r\nb\r\n", "f:1"), PlainText("a\r\nb", "f:1", answer=3)),
        (turns("a", "b"), turns("a ", "b"), turns("\na", " b\n")),
        (turns("a", "b\nc"), turns("a\r\n", "b\r\nc")),
    ):
        assert {digest(other, seed=0) for other in same} == {digest(row, seed=0)}
    different = [
        PlainText("a b", "", answer=2),
        PlainText("ab", "", answer=1),
        PlainText("a  b", ""),
        turns("a", "b"),
        turns("a b", ""),
        turns("", "a b"),
    ]
    assert len({digest(row, seed=0) for row in different}) == len(different)


def test_rows_are_the_same_with_other_ids_of_calls_and_weights_and_not_with_other_calls_tools_or_thoughts():
    def calling(city, call_id="1", tool="f", train=None, thoughts=""):
        function = {"name": "f", "arguments": {"city": city, "n": 1}}
        extra = {"tool_calls": [{"type": "function", "function": function, "id": call_id}]}
        extra |= {"reasoning_content": thoughts} if thoughts else {}
        told = Message("tool", "1", {"tool_call_id": call_id})
        messages = (Message("user", "a"), Message("assistant", "", extra, train), told)
        return Conversation(messages, "f:1", tools=({"type": "function", "function": {"name": tool}},))

    same = [calling("Rome"), calling("Rome", call_id="2"), calling("Rome", train=False)]
    assert len({digest(row, seed=0) for row in same}) == 1
    plain = Conversation((Message("user", "a"), Message("assistant", ""), Message("tool", "1")), "f:1")
    different = [calling("Rome"), calling("Oslo"), calling("Rome", tool="g"), calling("Rome", thoughts="b"), plain]
    assert len({digest(row, seed=0) for row in different}) == len(different)


@pytest.mark.parametrize(("rows", "fraction", "expected"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.05, 1), (100, 0.25, 25)])
def test_a_tiny_set_validates_on_at_least_one_row_and_trains_on_at_least_one(rows, fraction, expected):
    assert held_out(digests(*map(str, range(rows))), fraction=fraction).sum() == expected


def test_many_equal_rows_are_not_all_held_out():
    for seed in range(10):
        held = held_out(digests(*["same"] * 90, *map(str, range(10)), seed=seed), fraction=0.05)
        assert (held.sum(), held[:90].any()) == (5, False)
    assert held_out(digests(*["a"] * 50, *["b"] * 40), fraction=0.05).sum() == 40


def test_a_rows_side_follows_from_the_seed_and_not_from_its_place():
    names = [str(n) for n in range(200)]
    sides = []
    for order, seed in ((names, 3), (names[::-1], 3), (names, 4)):
        held = held_out(digests(*order, seed=seed), fraction=0.1)
        sides.append({name for name, chosen in zip(order, held, strict=True) if chosen})
    assert sides[0] == sides[1]
    assert sides[0] != sides[2]


def test_an_epoch_gives_each_source_its_share_and_keeps_its_length():
    sources = [np.arange(0, 90), np.arange(90, 100)]
    rows, repeated, left_out = weighted(sources, [3.0, 1.0], seed=0)
    assert len(rows) == 100
    assert (np.count_nonzero(rows < 90), np.count_nonzero(rows >= 90)) == (75, 25)
    assert (repeated, left_out) == (15, 15)
    assert set(np.bincount(rows)[90:]) == {2, 3}  # whole passes first, then a choice
    assert np.bincount(rows)[:90].max() == 1
    assert np.array_equal(rows, weighted(sources, [30.0, 10.0], seed=0)[0])
    assert not np.array_equal(rows, weighted(sources, [3.0, 1.0], seed=1)[0])


def test_equal_shares_of_equal_sources_are_all_rows_once():
    rows, repeated, left_out = weighted([np.arange(5), np.arange(5, 10)], [0.5, 0.5], seed=0)
    assert (sorted(rows), repeated, left_out) == (list(range(10)), 0, 0)
