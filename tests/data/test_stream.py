"""Streaming: the same steps for every number of ranks, exact restoring, bounded memory, endless passes."""

import gc
import itertools
import json
import weakref
from collections import Counter

import numpy as np
import pytest

from launcher.data import stream as stream_module
from launcher.data.loader import StepShape, StreamLoader
from launcher.data.pack.blocks import Blocks
from launcher.data.prepare import prepare
from launcher.data.stream import Stream, StreamReader
from launcher.errors import CheckpointError, DataError
from launcher.recipe.data_section import DataSection


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(stream_module, "WINDOW_BLOCKS", 8)
    monkeypatch.setattr(stream_module, "DRAWN_ROWS", 16)


def rows(number, word="river"):
    return [{"text": f"a {word} {n} flows to the sea " + "and on " * (n % 9)} for n in range(number)]


def streamed(*paths, tokenizer, weights=None, **more):
    sources = [{"path": path, **({"weight": weights[i]} if weights else {})} for i, path in enumerate(paths)]
    options = {"streaming": True, "validation": 0, "max_length": 128, **more}
    prepared = prepare(DataSection.model_validate({"sources": sources, **options}), tokenizer, seed=0)
    assert isinstance(prepared.train, Stream)
    return prepared.train


def loader(stream, *, rank=0, world_size=1, accumulation=1):
    return StreamLoader(stream, micro_batch=2, accumulation=accumulation, rank=rank, world_size=world_size)


def rows_seen(batch):
    return [row.tolist() for micro in batch.micro_batches for row in micro.input_ids]


def test_a_stream_goes_over_its_rows_again_and_again_and_each_row_comes_once_a_pass(write, tokenizer):
    stream = streamed(write(rows(100)), tokenizer=tokenizer)
    texts: Counter[str] = Counter()
    for batch in itertools.islice(loader(stream), 60):
        for micro in batch.micro_batches:
            for ids, numbers in zip(micro.input_ids, micro.document_ids, strict=True):
                texts.update(tokenizer.decode(ids[numbers == n]) for n in range(int(numbers.max()) + 1))
    seen = {text: n for text, n in texts.items() if "river" in text}
    assert len(seen) == 100
    assert max(seen.values()) - min(seen.values()) <= 1 and min(seen.values()) > 1


def test_steps_do_not_depend_on_the_number_of_ranks(write, tokenizer):
    path = write(rows(60))
    alone = loader(streamed(path, tokenizer=tokenizer), accumulation=2)
    first, second = (loader(streamed(path, tokenizer=tokenizer), rank=rank, world_size=2) for rank in (0, 1))
    for one, a, b in itertools.islice(zip(alone, first, second, strict=True), 20):
        assert rows_seen(one) == rows_seen(a) + rows_seen(b)
        assert one.supervised_tokens == a.supervised_tokens == b.supervised_tokens > 0


def test_a_state_restores_the_very_next_batch_and_counts_no_row_twice(write, tokenizer):
    """Into a new loader and into one that reads ahead. Rows that spell out a control token are tokenised in pieces."""
    chats = [{"messages": [{"role": "user", "content": f"what is <|eot|> {n}?"},
                           {"role": "assistant", "content": "an <|eot|> end"}]} for n in range(50)]  # fmt: skip
    paths = write(chats), write(rows(20), name="other.jsonl")
    stream, others = (streamed(*paths, tokenizer=tokenizer, weights=[1, 2]) for _ in range(2))
    original, running = loader(stream), loader(others)
    next(running)  # begins to read ahead
    states, batches, counts = [], [], []
    for _ in range(20):
        states.append(json.loads(json.dumps(original.state_dict())))
        batches.append(next(original))
        counts.append(dict(stream.counts))
    assert len({state["epoch"] for state in states}) > 3
    for number in (15, 3, 11, 0, 18, 7, 6):
        for restored in (running, loader(others)):
            restored.load_state_dict(states[number])
            again = next(restored)
            assert rows_seen(again) == rows_seen(batches[number]) and again.epoch == batches[number].epoch
            assert dict(others.counts) == counts[number]
            assert json.loads(json.dumps(restored.state_dict())) == states[number + 1]


@pytest.mark.parametrize("accumulation", [1, 3, 50])
def test_a_state_of_another_cut_goes_on_in_its_window_or_in_the_next(write, tokenizer, accumulation):
    path = write(rows(60))
    original = loader(streamed(path, tokenizer=tokenizer), accumulation=2)
    for _ in range(8):
        state = json.loads(json.dumps(original.state_dict()))
        other = loader(streamed(path, tokenizer=tokenizer), accumulation=accumulation)
        left_out = other.load_state_dict(state, saved_by=StepShape(2, 2))
        batch = next(other)
        first, again = rows_seen(next(original)), rows_seen(batch)
        assert (left_out == 0) == (state["offset"] * 2 % accumulation == 0)
        if not left_out:
            assert again[:2] == first[:2] and batch.epoch == state["epoch"]
        elif accumulation == 50:
            assert batch.epoch == state["epoch"] + 1
    assert state["epoch"] > 1


def test_weights_are_the_shares_of_the_rows_drawn(write, tokenizer):
    paths = write(rows(300)), write(rows(30, "harbour"), name="other.jsonl")
    stream = streamed(*paths, tokenizer=tokenizer, weights=[1, 3])
    sources, drawn = StreamReader(stream, stream.beginning).draw(np.random.default_rng(0), 2000)
    assert [source == 1 for source in sources] == ["harbour" in row.text for row in drawn]
    share = sum(sources) / 2000
    assert share == pytest.approx(0.75, abs=0.03)


FULL = [{"text": "a river " * 200}] * 16  # a block each


@pytest.mark.parametrize(("batching", "first"), [("packed", rows(16)), ("packed", FULL), ("padded", FULL)])
def test_every_window_keeps_to_the_shapes_of_the_first_and_has_room_for_shorter_rows(write, tokenizer, batching, first):
    stream = streamed(write(first + [{"text": f"x{n}"} for n in range(200)]), tokenizer=tokenizer, batching=batching)
    batches = list(itertools.islice(loader(stream), 60))
    micros = [batch.micro_batches[0] for batch in batches]
    assert {(micro.input_ids.shape, micro.cu_seqlens.shape) for micro in micros} == {
        ((2, 128), (2 * stream.max_documents + 1,))
    }
    assert all(batch.supervised_tokens > 0 for batch in batches) and batches[-1].epoch > 0
    assert stream.max_documents == 2 if first is FULL else stream.max_documents > 2


def test_faults_are_found_before_training_and_later_ones_when_their_window_comes(write, tokenizer):
    with pytest.raises(DataError, match="rows.jsonl:3"):
        streamed(write([*rows(2), b"{"]), tokenizer=tokenizer)
    later = loader(streamed(write([*rows(90), b"{"]), tokenizer=tokenizer))
    with pytest.raises(DataError, match="rows.jsonl:91"):
        for _ in range(100):
            next(later)
    skipping = streamed(write([*rows(90), b"{"]), tokenizer=tokenizer, bad_rows="skip")
    for _ in itertools.islice(loader(skipping), 30):
        pass
    assert skipping.counts["rows_dropped_broken_json"] >= 1


@pytest.mark.parametrize("content", [[], [b"{"], [{"messages": [{"role": "user", "content": "Hi"}]}]])
def test_a_stream_without_a_usable_row_ends_with_an_error_and_not_in_a_circle(write, tokenizer, content):
    with pytest.raises(DataError, match="0 usable rows"):
        streamed(write(content), tokenizer=tokenizer, bad_rows="skip")


GOOD = {"epoch": 1, "offset": 0, "positions": [[0, 20]], "counts": {}}


@pytest.mark.parametrize(
    "change",
    [
        {"positions": [[0, 0], [0, 0]]},
        {"positions": [[0, 51]]},
        {"positions": None},
        {"positions": [[0]]},
        {"epoch": -1},
        {"epoch": "1"},
        {"offset": 10**6},
        {"epoch": 1.5},
        {"counts": None},
        {"counts": {"rows_read": "20"}},
    ],
)
def test_a_state_that_cannot_be_is_refused(write, tokenizer, change):
    running = loader(streamed(write(rows(50)), tokenizer=tokenizer))
    with pytest.raises(CheckpointError, match="\nFound: "):
        running.load_state_dict({**GOOD, **change})
    running.load_state_dict(GOOD)


@pytest.mark.parametrize("change", [{"positions": [[0, 51]]}, {"offset": 10**6}])
@pytest.mark.parametrize("steps", [0, 3, 40])
def test_after_a_refused_state_the_loader_goes_on_as_before(write, tokenizer, change, steps):
    path = write(rows(50))
    streams = [streamed(path, tokenizer=tokenizer) for _ in range(2)]
    refusing, untouched = map(loader, streams)
    for _ in range(steps):
        next(refusing), next(untouched)
    with pytest.raises(CheckpointError):
        refusing.load_state_dict({**GOOD, **change})
    for _ in range(20):
        assert refusing.state_dict() == untouched.state_dict()
        assert streams[0].counts == streams[1].counts
        assert rows_seen(next(refusing)) == rows_seen(next(untouched))
    assert refusing.state_dict()["epoch"] > 1


def test_a_weighted_source_that_gives_nothing_is_an_error_though_others_do(write, tokenizer):
    silent = write([{"messages": [{"role": "user", "content": "Hi"}]}] * 3, name="silent.jsonl")
    with pytest.raises(DataError, match="silent.jsonl: 0 usable rows"):
        streamed(write(rows(50)), silent, tokenizer=tokenizer, weights=[1, 1])


def test_rows_of_the_validation_data_are_left_out_of_a_stream(write, tokenizer):
    held = write(rows(50)[:10], name="held.jsonl")
    stream = streamed(write(rows(50)), tokenizer=tokenizer, validation=held)
    trained = {
        str(tokenizer.decode(stream.first_window.blocks.documents[d].input_ids))
        for d in stream.first_window.blocks.block_documents
    }
    assert not any(f"a river {n} flows" in text for n in range(10) for text in trained)
    assert stream.counts["rows_dropped_in_validation"] >= 10
    assert stream.counts["validation_rows_read"] == 10


def test_the_windows_behind_are_given_up(write, tokenizer, monkeypatch):
    made: list[weakref.ref[Blocks]] = []
    original = StreamReader.read_window

    def recorded(self, number):
        window = original(self, number)
        made.append(weakref.ref(window.blocks))
        return window

    monkeypatch.setattr(StreamReader, "read_window", recorded)
    running = loader(streamed(write(rows(50)), tokenizer=tokenizer))
    for _ in itertools.islice(running, 60):
        pass
    gc.collect()
    assert len(made) > 8
    assert sum(window() is not None for window in made) <= 3  # the first, the one served, the one read ahead
