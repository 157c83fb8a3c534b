import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.reading import feeds, fields, refusal

ROW = {"text": "a river"}
CONTENT = {
    "a.jsonl": json.dumps(ROW) + "\n\n" + json.dumps(ROW),
    "b.json": json.dumps({"data": [ROW, ROW]}),
    "c.csv": "text\na river\na river\n",
    "d.txt": "a river\r\n\na river",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in reversed(CONTENT.items()):
        (tmp_path / name).write_text(text, newline="")
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", CONTENT)
def test_every_kind_of_file_gives_its_rows_from_the_first_at_each_call(folder, name, streaming):
    [feed] = feeds(folder / name, streaming=streaming, format="text", weight=2.0)
    assert (feed.name, feed.format) == (str(folder / name), "text")
    assert fields(feed) == fields(feed) == [ROW, ROW]
    first, second = (raw.where for raw in feed.raw_rows())
    assert first != second and all(where.startswith(f"{folder / name}") for where in (first, second))


def test_a_folder_gives_a_feed_per_file_sorted_by_path_without_hidden_ones(tmp_path, monkeypatch):
    walk = os.walk

    def walk_backwards(*args: Any, **keys: Any) -> Any:  # the order of a file system may be any
        return ((parent, folders, sorted(names, reverse=True)) for parent, folders, names in walk(*args, **keys))

    monkeypatch.setattr(os, "walk", walk_backwards)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "deep/er/E.JSONL", ".hidden.jsonl", ".git/x.jsonl", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(CONTENT["a.jsonl"])
    names = [str(Path(feed.name).relative_to(tmp_path)) for feed in feeds(tmp_path)]
    assert names == ["a.jsonl", "b.jsonl", "deep/er/E.JSONL"]
    assert all(fields(feed) == [ROW, ROW] for feed in feeds(tmp_path))


def test_a_folder_without_data_says_what_it_holds(tmp_path):
    assert "nothing that is not hidden" in refusal(tmp_path)
    for number in range(7):
        (tmp_path / f"{number}.jsonl.xz").touch()
    message = refusal(tmp_path)
    assert "0.jsonl.xz, " in message and "2 more" in message and "6.jsonl" not in message


@pytest.mark.parametrize(
    "path", ["./owner/rows", "../rows", "/owner/rows", "~/rows", "owner/rows.jsonl", "a b", "a/b/c", "owner/.rows"]
)
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    message = refusal(path)
    assert message.startswith(f"{path}: ") and "no such file" in message and "data.sources" in message


def test_a_file_of_another_kind_is_refused_with_what_is_supported(tmp_path):
    for name in ("rows.xlsx", "rows"):
        (tmp_path / name).touch()
    assert "a .xlsx file" in refusal(tmp_path / "rows.xlsx") and "a nameless file" in refusal(tmp_path / "rows")
    assert ".jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt" in refusal(tmp_path / "rows")
    assert "no regular file" in refusal("/dev/null")
    assert "too long" in refusal(tmp_path / ("x" * 300 + ".jsonl"))
    assert "home" in refusal("~no-such-user/rows.jsonl")


@pytest.mark.parametrize(
    ("key", "names"), [("config", ["", "a.jsonl"]), ("revision", ["", "a.jsonl"]), ("split", ["a.jsonl"])]
)
def test_what_belongs_to_the_hub_is_refused_beside_a_local_path(folder, key, names):
    for name in names:
        assert f"{key}: 'main'" in refusal(folder / name, **{key: "main"})


def test_a_local_folder_goes_before_a_dataset_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(feeds("rows")) == len(feeds("~/rows")) == 1


def test_a_file_is_identified_by_its_bytes_and_streamed_by_its_modification(folder):
    file = folder / "a.jsonl"

    def identities() -> list[str]:
        return [feeds(file, streaming=streaming)[0].identity for streaming in (False, True)]

    before = identities()
    assert identities() == before and before[0] != before[1]
    file.write_text(CONTENT["a.jsonl"])  # the same bytes at another time
    assert [new == old for new, old in zip(identities(), before, strict=True)] == [True, False]
    file.write_text(CONTENT["a.jsonl"].replace("river", "rover"))
    assert identities()[0] != before[0]
    (folder / "a.txt").write_text(CONTENT["a.jsonl"])
    assert feeds(folder / "a.txt")[0].identity != before[0], "the same bytes are other rows as .txt"


def test_local_files_need_neither_datasets_nor_the_hub(folder):
    pq.write_table(pa.table({"text": ["a river"]}), folder / "e.parquet")
    paths = [str(path) for path in sorted(folder.iterdir())]
    code = (
        "import sys\nfrom launcher.data.read.sources import open_source\n"
        "from launcher.recipe.data_section import DataSection, Source\n"
        f"sources = [Source(path=path) for path in {paths!r}]\n"
        "sections = [DataSection(streaming=streaming, validation=0) for streaming in (False, True)]\n"
        "feeds = [feed for data in sections for source in sources for feed in open_source(source, data=data).feeds]\n"
        "assert [len([*feed.raw_rows()]) for feed in feeds] == [2, 2, 2, 2, 1] * 2\n"
        "print([m for m in ('datasets', 'huggingface_hub', 'torch', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
