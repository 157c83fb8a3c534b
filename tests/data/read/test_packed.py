"""Packed files: gzip and Zstandard, whole, cut short, damaged, and such that unpack to too much."""

import gzip
import json

import pyarrow as pa
import pytest

from launcher.data.read import packed
from tests.support.reading import feeds, fields, opened, read, refusal

ROWS = [{"text": f"river {n}"} for n in range(50)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CONTENT = {
    ".jsonl": LINES,
    ".json": json.dumps(ROWS).encode(),
    ".csv": ("text\n" + "".join(f"{row['text']}\n" for row in ROWS)).encode(),
    ".tsv": ("text\n" + "".join(f"{row['text']}\n" for row in ROWS)).encode(),
    ".txt": "".join(f"{row['text']}\n" for row in ROWS).encode(),
}


def zstd(content):
    return pa.compress(content, codec="zstd", asbytes=True)


PACK = {".gz": gzip.compress, ".zst": zstd}


@pytest.fixture(params=PACK)
def packing(request):
    return request.param


@pytest.fixture
def put(tmp_path, packing):
    def put(kind, content):
        path = tmp_path / f"rows{kind}{packing}"
        path.write_bytes(content)
        return path

    return put


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", CONTENT)
def test_every_kind_of_text_file_is_read_packed_from_the_first_row_at_each_call(kind, put, packing, streaming):
    path = put(kind, PACK[packing](CONTENT[kind]))
    [feed] = feeds(path, streaming=streaming)
    assert fields(feed) == fields(feed) == ROWS


def test_a_byte_order_mark_and_several_packed_parts_make_no_difference(put, packing):
    path = put(".jsonl", PACK[packing](b"\xef\xbb\xbf" + LINES[:9]) + PACK[packing](LINES[9:]))
    assert fields(path) == ROWS
    broken = put(".jsonl", PACK[packing](b"\xef\xbb\xbf" + LINES + b"{\n"))
    assert f"byte offset {3 + len(LINES) + 2} of the file" in refusal(broken)


@pytest.mark.parametrize("harm", ["cut", "nothing packed", "changed"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_damaged_file_ends_with_its_name_and_without_traceback(put, packing, kind, harm):
    whole = PACK[packing](CONTENT[kind])
    path = put(kind, {"cut": whole[:-6], "nothing packed": b"plain " * 9, "changed": whole[:9] + b"\xff" * 99}[harm])
    message = refusal(path, bad_rows="skip", streaming=True)
    assert message.startswith(f"{path}: a source must be readable.\nFound: ")
    assert (f"rename it without {path.suffix}" in message) == (harm == "nothing packed")


@pytest.mark.parametrize("content", [b" " * 600_000, b"\n" * 600_000, LINES * 900])
def test_what_unpacks_to_too_much_is_stopped(put, packing, monkeypatch, content):
    monkeypatch.setattr(packed, "UNPACKED_FREELY_BYTES", 500_000)
    monkeypatch.setattr(packed, "MAX_UNPACKED_TIMES", 50)
    path = put(".jsonl", PACK[packing](content))
    assert path.stat().st_size * packed.MAX_UNPACKED_TIMES < len(content)
    message = refusal(path, streaming=True, bad_rows="skip")
    assert "it unpacks to more than 500,000 bytes" in message and "unpack it yourself" in message


def test_a_row_that_is_too_long_is_a_fault_in_a_packed_file_too(put, packing):
    path = put(".jsonl", PACK[packing](LINES + b'{"text": "' + b"a" * 100_000 + b'"}\n' + LINES))
    rows, counts = read(path, bad_rows="skip", max_row_mib=0.01)
    assert len(rows) == 100 and counts["rows_dropped_too_large"] == 1


def test_packed_files_of_a_folder_are_read_in_order_unless_others_lie_beside_them(tmp_path):
    for name in ("b.jsonl.zst", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(PACK[name[-4:].lstrip("l")](LINES))
    assert [feed.name.rpartition("/")[2] for feed in feeds(tmp_path)] == ["a.jsonl.gz", "b.jsonl.zst"]
    (tmp_path / "c.jsonl").write_bytes(LINES)
    [note] = opened(tmp_path).notes
    assert "read c.jsonl; left out a.jsonl.gz, b.jsonl.zst (packed" in note
