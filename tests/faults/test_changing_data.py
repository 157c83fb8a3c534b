"""Data that changes while it is read is refused and never cached; a damaged or hostile parquet is named."""

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from launcher.data import prepare as prepare_module
from launcher.data.prepare import prepare
from launcher.data.read.rows import ReadingProgress
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection
from tests.conftest import TINY
from tests.support.reading import feeds, read, refusal


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY / "base")


@pytest.fixture
def home(monkeypatch, tmp_path) -> Path:
    """The folder of the data cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "qlora-launcher" / "data"


def section(path: Path, **options: Any) -> DataSection:
    return DataSection.model_validate({"sources": [{"path": str(path)}], "validation": 0, **options})


KINDS: dict[str, Callable[[list[str]], bytes]] = {  # a file of these texts
    ".jsonl": lambda texts: "".join(json.dumps({"text": text}) + "\n" for text in texts).encode(),
    ".jsonl.gz": lambda texts: gzip.compress(KINDS[".jsonl"](texts), mtime=0),
    ".jsonl.zst": lambda texts: pa.compress(KINDS[".jsonl"](texts), codec="zstd", asbytes=True),
    ".json": lambda texts: json.dumps([{"text": text} for text in texts]).encode(),
    ".csv": lambda texts: "\n".join(["text", *texts]).encode(),
    ".txt": lambda texts: "\n".join(texts).encode(),
    ".tsv": lambda texts: KINDS[".csv"](texts),
    ".parquet": lambda texts: parquet({"text": texts}),
    ".arrow": lambda texts: arrow({"text": texts}),
}
BEFORE, AFTER = [f"a river {n}" for n in range(2000)], [f"a brook {n}" for n in range(2000)]


def parquet(columns: dict[str, list[str]], **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, **options)
    return bytes(sink.getvalue())


def arrow(columns: dict[str, list[str]]) -> bytes:
    sink, table = pa.BufferOutputStream(), pa.table(columns)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    return bytes(sink.getvalue())


@pytest.fixture
def while_read(monkeypatch) -> Callable[[Callable[[], Any]], None]:
    """Has something done after the first row of each source is read."""
    original = prepare_module.read_rows

    def install(act: Callable[[], Any]) -> None:
        def read_rows(*args: Any, **keys: Any) -> Iterator[Any]:
            rows = original(*args, **keys)
            yield next(rows)
            act()
            yield from rows

        monkeypatch.setattr(prepare_module, "read_rows", read_rows)

    return install


def assert_refused_uncached(data: DataSection, tokenizer: Any, home: Path, *, named: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepare(data, tokenizer, seed=0)
    said = f"{named}: a source must stay as it is while it is read"  # not what the change has made of a row
    assert caught.value.code == 3 and str(caught.value).startswith(said), str(caught.value)
    assert not list(home.glob("*.safetensors")), "nothing is cached"


@pytest.mark.parametrize("kind", KINDS)
def test_fault_40_a_file_of_any_kind_that_changes_while_it_is_read_is_refused_and_not_cached(
    tmp_path, tokenizer, home, while_read, kind
):
    path = tmp_path / f"rows{kind}"
    path.write_bytes(KINDS[kind](BEFORE))

    def write_in_place_at_the_same_time() -> None:
        times = path.stat()
        with path.open("r+b") as file:
            file.write(KINDS[kind](AFTER))
            file.truncate()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    while_read(write_in_place_at_the_same_time)
    assert_refused_uncached(section(path), tokenizer, home, named=path)


def replaced_by_the_same(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "grows": lambda path: path.write_bytes(path.read_bytes() + b'{"text": "more"}\n'),
    "cut": lambda path: os.truncate(path, 1000),
    "removed": Path.unlink,
    "replaced": replaced_by_the_same,  # what was read may have been others' rows
}


@pytest.mark.parametrize("change", CHANGES)
def test_fault_40_whatever_changes_a_file_while_it_is_read_ends_the_preparation(
    tmp_path, tokenizer, home, while_read, change
):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(KINDS[".jsonl"](BEFORE))
    while_read(lambda: CHANGES[change](path))
    assert_refused_uncached(section(path, bad_rows="skip"), tokenizer, home, named=path)


@pytest.mark.parametrize("change", CHANGES)
def test_fault_40_a_file_that_changes_while_it_is_streamed_is_refused_at_the_end_of_the_pass(tmp_path, change):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(KINDS[".jsonl"](BEFORE))
    [feed] = feeds(path, streaming=True)
    rows = feed.raw_rows()
    next(rows)
    CHANGES[change](path)
    with pytest.raises(DataError, match="a source must stay as it is while it is read"):
        list(rows)


@pytest.mark.parametrize("change", ["appeared", "went"])
def test_fault_40_a_file_that_appears_in_a_folder_or_goes_while_it_is_read_is_named(
    tmp_path, tokenizer, home, while_read, change
):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_bytes(KINDS[".jsonl"](BEFORE))
    act = {"appeared": lambda: shutil.copy(folder / "a.jsonl", folder / "c.jsonl"), "went": (folder / "a.jsonl").unlink}
    while_read(act[change])
    with pytest.raises(DataError, match=rf"{folder}/[ac].jsonl: .*\nFound: it {change} while it was read"):
        prepare(section(folder), tokenizer, seed=0)
    assert not list(home.glob("*.safetensors"))


def test_fault_40_data_that_stays_as_it_is_is_cached(tmp_path, tokenizer, home, while_read):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(KINDS[".jsonl"](BEFORE))
    while_read((tmp_path / "elsewhere").touch)
    prepare(section(path), tokenizer, seed=0)
    assert len(list(home.glob("*.safetensors"))) == 1


def test_fault_51_a_flipped_byte_in_a_page_with_a_checksum_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    options: dict[str, Any] = {"use_dictionary": False, "compression": "none", "write_page_checksum": True}
    raw = bytearray(parquet({"text": BEFORE}, **options))
    raw[raw.index(b"river 7")] ^= 1
    path.write_bytes(raw)
    assert refusal(path).startswith(f"{path}: a source must be readable")


def test_fault_51_no_flipped_byte_in_what_a_parquet_says_of_itself_ends_the_process(tmp_path):
    """Some sizes of single columns, asked for, do: pyarrow 26 then calls abort()."""
    path = tmp_path / "rows.parquet"
    raw = parquet({"text": BEFORE[:300]}, row_group_size=150)
    footer = int.from_bytes(raw[-8:-4], "little")
    refused = 0
    for place in range(len(raw) - 8 - footer, len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        try:
            read(path, bad_rows="skip")
        except DataError as error:
            refused += str(error).startswith(str(path))
    assert refused > 100


def test_fault_51_millions_of_equal_rows_in_a_small_file_are_refused_and_what_takes_long_shows_its_rows(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet({"text": ["a river"] * 10**6}))
    assert path.stat().st_size < 10_000
    message = refusal(path)
    assert message.startswith(f"{path}: ") and "1,000,000 rows in" in message
    path.write_bytes(parquet({"text": ["a river"] * 30_000}))
    progress = ReadingProgress()
    [feed] = feeds(path)
    shown = {progress() for _ in progress.watched(feed).raw_rows()}
    assert f"over 20,000 rows of {path}" in shown and len(shown) < 50
