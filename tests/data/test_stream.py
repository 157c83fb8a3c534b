"""Streaming: the same steps for every number of ranks, exact restoring, bounded memory, endless passes."""

import gc
import itertools
import json
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from launcher.data import stream as stream_module
from launcher.data.blocks import Blocks
from launcher.data.prepare import prepare
from launcher.data.stream import Stream, StreamLoader
from launcher.errors import CheckpointError, DataError
from launcher.recipe.schema import DataSection

Write = Callable[..., str]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "WINDOW_BLOCKS", 8)
    monkeypatch.setattr(stream_module, "CHUNK", 16)


def rows(number: int, word: str = "river") -> list[dict[str, Any]]:
    return [{"text": f"a {word} {n} flows to the sea " + "and on " * (n % 9)} for n in range(number)]


def streamed(
    *paths: str, tokenizer: PreTrainedTokenizerFast, weights: list[float] | None = None, **more: Any
) -> Stream:
    sources = [{"path": path, **({"weight": weights[i]} if weights else {})} for i, path in enumerate(paths)]
    options = {"streaming": True, "validation": 0, "max_length": 128, **more}
    prepared = prepare(DataSection.model_validate({"sources": sources, **options}), tokenizer, seed=0)
    assert isinstance(prepared.train, Stream)
    return prepared.train


def loader(stream: Stream, *, rank: int = 0, world_size: int = 1, accumulation: int = 1) -> StreamLoader:
    return StreamLoader(stream, micro_batch=2, accumulation=accumulation, rank=rank, world_size=world_size)


def rows_seen(batch: Any) -> list[list[int]]:
    return [row.tolist() for micro in batch.micro_batches for row in micro.input_ids]


def test_a_stream_goes_over_its_rows_again_and_again_and_each_row_comes_once_a_pass(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    stream = streamed(write(rows(100)), tokenizer=tokenizer)
    texts: Counter[str] = Counter()
    for batch in itertools.islice(loader(stream), 60):
        for micro in batch.micro_batches:
            for ids, numbers in zip(micro.input_ids, micro.document_ids, strict=True):
                texts.update(tokenizer.decode(ids[numbers == n]) for n in range(int(numbers.max()) + 1))
    seen = {text: n for text, n in texts.items() if "river" in text}
    assert len(seen) == 100
    assert max(seen.values()) - min(seen.values()) <= 1 and min(seen.values()) > 1


def test_steps_do_not_depend_on_the_number_of_ranks(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(rows(60))
    alone = loader(streamed(path, tokenizer=tokenizer), accumulation=2)
    first, second = (loader(streamed(path, tokenizer=tokenizer), rank=rank, world_size=2) for rank in (0, 1))
    for one, a, b in itertools.islice(zip(alone, first, second, strict=True), 20):
        assert rows_seen(one) == rows_seen(a) + rows_seen(b)
        assert one.supervised_tokens == a.supervised_tokens == b.supervised_tokens > 0


def test_a_state_restores_the_very_next_batch_at_every_step(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    paths = write(rows(50)), write(rows(20, "harbour"), name="other.jsonl")
    original = loader(streamed(*paths, tokenizer=tokenizer, weights=[1, 2]))
    states, batches = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(original.state())))
        batches.append(next(original))
    assert len({state["epoch"] for state in states}) > 2
    states.append(json.loads(json.dumps(original.state())))
    for state, following, batch in zip(states, states[1:], batches, strict=False):
        restored = loader(streamed(*paths, tokenizer=tokenizer, weights=[1, 2]))
        restored.restore(state)
        again = next(restored)
        assert rows_seen(again) == rows_seen(batch)
        assert again.epoch == batch.epoch
        assert json.loads(json.dumps(restored.state())) == following


def test_weights_are_the_shares_of_the_rows_drawn(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    paths = write(rows(300)), write(rows(30, "harbour"), name="other.jsonl")
    stream = streamed(*paths, tokenizer=tokenizer, weights=[1, 3])
    reader = stream_module._Reader(stream, stream.beginning)
    drawn = reader.draw(np.random.default_rng(0), 2000)
    share = sum("harbour" in row.text for row in drawn) / 2000  # type: ignore[union-attr]
    assert share == pytest.approx(0.75, abs=0.03)


def test_every_window_keeps_to_the_shapes_of_the_first(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    long, short = rows(16), [{"text": f"x{n}"} for n in range(200)]  # later windows would hold far more documents a row
    stream = streamed(write(long + short), tokenizer=tokenizer)
    batches = list(itertools.islice(loader(stream), 40))
    assert len({batch.micro_batches[0].cu_seqlens.shape for batch in batches}) == 1
    assert max(batch.epoch for batch in batches) > 2


def test_padded_streams_have_a_document_a_row(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    stream = streamed(write(rows(50)), tokenizer=tokenizer, batching="padded")
    batch = next(loader(stream))
    assert stream.first.shapes == (128,)
    assert int(batch.micro_batches[0].document_ids.max()) == 1  # the padding


def test_faults_are_found_before_training_and_later_ones_when_their_window_comes(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
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
def test_a_stream_without_a_usable_row_ends_with_an_error_and_not_in_a_circle(
    write: Write, tokenizer: PreTrainedTokenizerFast, content: list[Any]
) -> None:
    with pytest.raises(DataError, match="0 usable rows"):
        streamed(write(content), tokenizer=tokenizer, bad_rows="skip")


def test_a_state_of_other_sources_is_refused(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    stream = streamed(write(rows(50)), tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match="1.*\nFound: 2"):
        loader(stream).restore({"epoch": 0, "offset": 0, "places": [(0, 0), (0, 0)]})


def test_the_windows_behind_are_given_up(
    write: Write, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Blocks]] = []
    original = Stream.window

    def recorded(self: Stream, reader: Any, *, number: int) -> Blocks:
        blocks = original(self, reader, number=number)
        made.append(weakref.ref(blocks))
        return blocks

    monkeypatch.setattr(Stream, "window", recorded)
    running = loader(streamed(write(rows(50)), tokenizer=tokenizer))
    for _ in itertools.islice(running, 60):
        pass
    gc.collect()
    assert len(made) > 8
    assert sum(window() is not None for window in made) <= 3  # the first, the one served, the one read ahead
