"""Folders of `datasets`' save_to_disk and other .arrow files."""

import json
from typing import Any

import datasets
import pyarrow as pa
import pytest

from launcher.data.prepare import prepare
from launcher.data.read import packed, parquet_files
from launcher.data.read.rows import Conversation
from launcher.recipe.data_section import DataSection
from tests.support.reading import feeds, fields, opened, read, refusal

ROWS: list[dict[str, Any]] = [{"text": f"river {n}"} for n in range(30)]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def saved(path, rows=ROWS, shards=1):
    datasets.Dataset.from_list(rows).save_to_disk(str(path), num_shards=shards)
    return path


def texts(path, **keys):
    return [row["text"] for feed in feeds(path, **keys) for row in fields(feed)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_dataset_is_read_in_its_order(tmp_path, streaming):
    path = saved(tmp_path / "saved", shards=3)
    assert texts(path, streaming=streaming) == [row["text"] for row in ROWS]
    [note] = opened(path).notes
    assert "left out dataset_info.json, state.json (about the data)" in note


def test_chats_and_classes_of_a_saved_dataset_are_plain_values(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    data = datasets.Dataset.from_dict({"messages": [turns, turns], "kind": ["a", "b"]}).class_encode_column("kind")
    data.save_to_disk(str(tmp_path / "chats"))
    rows, counts = read(tmp_path / "chats")
    assert all(isinstance(row, Conversation) and len(row.messages) == 2 for row in rows) and len(rows) == 2
    assert counts["unused_key_kind"] == 2


def test_a_selection_that_was_saved_is_what_is_read(tmp_path):
    datasets.Dataset.from_list(ROWS).select([7, 3]).save_to_disk(str(tmp_path / "some"))
    assert texts(tmp_path / "some") == ["river 7", "river 3"]


def test_the_splits_of_a_saved_dictionary_are_chosen_as_those_of_a_folder(tmp_path, tokenizer):
    data = {name: datasets.Dataset.from_list([{"text": f"{name} {n}"} for n in range(5)]) for name in ("train", "test")}
    path = tmp_path / "both"
    datasets.DatasetDict(data).save_to_disk(str(path))
    assert texts(path)[0] == "train 0" and texts(path, split="test")[0] == "test 0"
    section = DataSection.model_validate({"sources": [{"path": str(path)}], "validation": str(path), "max_length": 64})
    prepared = prepare(section, tokenizer, seed=0)
    assert (prepared.train_rows, prepared.validation_rows) == (5, 5)


def test_caches_beside_a_saved_dataset_are_no_rows_of_it(tmp_path):
    path = saved(tmp_path / "saved")
    (path / "cache-0123.arrow").write_bytes((path / "data-00000-of-00001.arrow").read_bytes())
    assert len(texts(path)) == len(ROWS)
    assert "cache-0123.arrow (a cache of the saved dataset)" in opened(path).notes[0]


def test_a_saved_dataset_without_one_of_its_files_is_refused(tmp_path):
    path = saved(tmp_path / "saved", shards=3)
    (path / "data-00001-of-00003.arrow").unlink()
    message = refusal(path)
    assert message.startswith(f"{path / 'state.json'}: ") and "no data-00001-of-00003.arrow" in message
    for state in ("{", "[]", json.dumps({"_data_files": [3]})):
        (path / "state.json").write_text(state)
        assert "Save or copy it anew" in refusal(path)


@pytest.mark.parametrize("harm", ["no end", "cut between", "cut", "changed", "no table"])
def test_a_file_that_is_cut_or_damaged_is_refused(tmp_path, harm, capfd):
    path = saved(tmp_path / "saved") / "data-00000-of-00001.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.schema({"text": pa.string()})) as writer:
        ends = []
        for _ in range(3):
            writer.write_batch(pa.record_batch({"text": [row["text"] for row in ROWS]}))
            ends.append(sink.tell())
    raw = path.read_bytes()
    at = raw.rindex(b"river 29") - 300
    path.write_bytes(
        {
            "no end": raw[:-8],
            "cut between": raw[: ends[0]],
            "cut": raw[: ends[1] + 40],
            "changed": raw[: at - 100] + b"\xff" * 100 + raw[at:],
            "no table": b"plain text " * 9,
        }[harm]
    )
    message = refusal(path.parent, bad_rows="skip", streaming=True)
    assert message.startswith(f"{path}: a source must be readable as a table.\nFound")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_a_single_file_of_either_form_is_read(tmp_path, new):
    table = pa.table({"text": pa.array([row["text"] for row in ROWS]).dictionary_encode()})
    path = tmp_path / "rows.arrow"
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    assert fields(path) == ROWS
    path.write_bytes(b"")
    assert fields(path) == []


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize(("rows", "batches"), [(10**9, 1), (1000, 40)])
def test_more_rows_than_a_file_of_its_size_can_hold_are_refused(tmp_path, monkeypatch, new, rows, batches):
    monkeypatch.setattr(parquet_files, "MAX_ROWS_PER_BYTE", 1)
    batch = pa.record_batch([pa.nulls(rows)], names=["text"])
    path = tmp_path / "nulls.arrow"
    with pa.OSFile(str(path), "wb") as sink, new(sink, batch.schema) as writer:
        for _ in range(batches):
            writer.write_batch(batch)
    assert "rows in" in refusal(path, bad_rows="skip", format="text")


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("batches", [1, 8])
def test_what_unpacks_to_too_much_is_refused_in_one_batch_or_several(tmp_path, monkeypatch, new, codec, batches):
    monkeypatch.setattr(packed, "UNPACKED_FREELY_BYTES", 800_000)
    monkeypatch.setattr(packed, "MAX_UNPACKED_TIMES", 10)
    batch = pa.record_batch({"text": ["a" * (1_600_000 // batches)]})
    path = tmp_path / "rows.arrow"
    with (
        pa.OSFile(str(path), "wb") as sink,
        new(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer,
    ):
        for _ in range(batches):
            writer.write_batch(batch)
    assert "it unpacks to more than 800,000 bytes" in refusal(path, bad_rows="skip")


def test_a_dictionary_that_many_batches_share_is_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "UNPACKED_FREELY_BYTES", 0)
    monkeypatch.setattr(packed, "MAX_UNPACKED_TIMES", 3)
    table = pa.table({"text": pa.array(["a river " * 1000] * 90).dictionary_encode()})
    path = tmp_path / "rows.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    assert len(fields(path)) == 90


def test_a_row_that_is_too_large_is_a_fault_and_its_neighbours_are_not(tmp_path):
    path = saved(tmp_path / "saved", [{"text": "a"}, {"text": "b" * 20_000}, {"text": "c"}])
    rows, counts = read(path, bad_rows="skip", max_row_mib=0.01)
    assert len(rows) == 2 and counts["rows_dropped_too_large"] == 1
