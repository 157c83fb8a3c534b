"""Data that is broken, odd or unreadable: named with code 3, or counted; nothing vanishes."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from launcher.data.loader import TrainLoader, train_loader
from launcher.data.prepare import prepare
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection
from tests.conftest import TINY
from tests.support.reading import fields, opened, read, refusal, written

NOBODY = 65_534


def chat(question: Any, answer: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


GOOD = chat("Hi", "Hello.")
LONG, LONG_QUESTION = chat("Define the word sea", "water " * 400), chat("why " * 400, "because")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY / "base")


def section(*paths: Any, **options: Any) -> DataSection:
    sources = [{"path": str(path)} for path in paths]
    return DataSection.model_validate({"sources": sources, "max_length": 256, "validation": 0, **options})


def test_fault_11_broken_json_is_named_by_line_and_byte(tmp_path):
    good = json.dumps({"text": "é" * 10}, ensure_ascii=False).encode()
    path = written(tmp_path / "rows.jsonl", [good] * 6 + [b'{"text": "\xc3\xa9" oops}'])
    message = refusal(path)
    offset = int(message.split("byte offset ")[1].split()[0])
    assert message.startswith(f"{path}:7: ") and "data.bad_rows=skip" in message
    assert path.read_bytes()[offset:].startswith(b"oops")


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ({"text": None}, "Found: null"),
        ({"other": "a"}, 'the columns other"'),
        ({"text": 7}, "Found: 7"),
        ({"text": ["a"]}, "Found: a list"),
        ([1, 2], "Found: a list"),
        (b"7", "Found: 7"),
    ],
)
def test_fault_12_a_text_that_is_null_missing_or_no_text_is_named_or_counted(tmp_path, bad, found):
    path = written(tmp_path / "rows.jsonl", [{"text": "a river"}, bad, {"text": "a sea"}])
    message = refusal(path)
    assert message.startswith(f"{path}:2: ") and found in message
    rows, counts = read(path, bad_rows="skip")
    assert len(rows) == 2 and counts == {"rows_read": 3, "rows_dropped_wrong_type": 1}


@pytest.mark.parametrize("row", [chat("Hi", " "), LONG_QUESTION, {"messages": [{"role": "user", "content": "Hi"}]}])
def test_fault_13_rows_with_nothing_to_learn_are_dropped_and_counted_and_refused_if_there_are_no_others(
    tmp_path, tokenizer, row
):
    mixed, alone = written(tmp_path / "a.jsonl", [GOOD, row]), written(tmp_path / "b.jsonl", [row, row])
    counts = prepare(section(mixed), tokenizer, seed=0).counts
    assert (counts["rows_read"], counts["rows_dropped_zero_supervised"], counts["documents"]) == (2, 1, 1)
    with pytest.raises(DataError, match="0 usable rows") as caught:
        prepare(section(alone), tokenizer, seed=0)
    assert "Found: 2 rows read; 2 rows dropped: nothing to learn" in str(caught.value)
    assert caught.value.code == 3 and len(str(caught.value).splitlines()) <= 5
    assert prepare(section(alone, loss_on="all"), tokenizer, seed=0).train_rows == 2


@pytest.mark.parametrize("role", ["ipython", "User ", "", None, 7])
def test_fault_14_an_unknown_role_is_named_with_its_row_and_the_roles_there_are(tmp_path, role):
    path = written(tmp_path / "rows.jsonl", [GOOD, {"messages": [{"role": role, "content": "a"}]}])
    message = refusal(path)
    assert message.startswith(
        f"{path}:2: a role is one of system, developer, user, assistant, tool.\nFound: {json.dumps(role)}"
    )
    assert read(path, bad_rows="skip")[1] == {"rows_read": 2, "rows_dropped_unknown_role": 1}


@pytest.mark.parametrize(
    ("raw", "at"),
    [
        (b'{"text": "caf\xe9"}', 13),
        (b'{"text": "\xed\xa0\xbd"}', 10),
        (b'{"text": "a\\ud83d"}', 11),
        (b'{"text": "\\ud83d\\ude00 \\\\ud83d \\ude00"}', 31),
        (b'{"text": "\\ud83d\\ud83d\\ude00"}', 10),
        (b'{"other": "\\uDC00", "text": "a"}', 11),
        (b'{"text": "a\x00"}', 11),
        ('{"text": "a"}'.encode("utf-16-le"), 1),
    ],
)
def test_fault_15_what_is_no_unicode_is_named_by_its_byte_in_the_file(tmp_path, raw, at):
    line = json.dumps({"text": "漢字"}, ensure_ascii=False).encode()
    message = refusal(written(tmp_path / "rows.jsonl", [line, raw]))
    assert "UTF-8" in message and f"byte offset {len(line) + 1 + at} " in message


def test_fault_16_over_long_rows_are_cut_dropped_or_refused_and_counted(tmp_path, tokenizer):
    path = written(tmp_path / "rows.jsonl", [*[GOOD] * 4, LONG, LONG_QUESTION])
    cut = prepare(section(path), tokenizer, seed=0)
    assert (cut.counts["truncated"], cut.counts["documents"]) == (1, 5)
    assert cut.counts["rows_dropped_zero_supervised"] == 1  # the question alone fills the row
    assert cut.first_blocks.longest_document == 256
    dropped = prepare(section(path, too_long="drop"), tokenizer, seed=0).counts
    assert (dropped["rows_dropped_too_long"], dropped["documents"], dropped["truncated"]) == (2, 4, 0)
    with pytest.raises(DataError, match=rf"{path}:5: .*data.max_length=256.*\nFound: \d+ tokens") as caught:
        prepare(section(path, too_long="raise", bad_rows="skip"), tokenizer, seed=0)
    assert caught.value.code == 3


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "txt"])
def test_fault_17_an_empty_file_of_any_kind_has_0_usable_rows(tmp_path, tokenizer, suffix):
    path = tmp_path / f"rows.{suffix}"
    path.touch()
    assert fields(path) == []
    with pytest.raises(DataError, match=r"(?s)0 usable rows.*Found: 0 rows read") as caught:
        prepare(section(path), tokenizer, seed=0)
    assert caught.value.code == 3


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_fault_18_rows_that_two_ranks_cannot_share_evenly_count_once_each(tmp_path, tokenizer, batching):
    path = written(tmp_path / "rows.jsonl", [{"text": f"a river {n} " + "flows " * 40} for n in range(7)])
    blocks = prepare(section(path, batching=batching, max_length=64), tokenizer, seed=0).first_blocks
    assert len(blocks) == 7
    shape: dict[str, Any] = {"micro_batch": 2, "accumulation": 1, "world_size": 2, "seed": 0}
    epoch = []
    for rank in range(2):
        loader = train_loader(blocks, rank=rank, **shape)
        assert isinstance(loader, TrainLoader) and loader.steps_per_epoch == 2
        epoch += list(islice(loader, 2))
    seen = [batch.input_ids[row].tolist() for step in epoch for batch in step.micro_batches for row in range(2)]
    real = [row for row in seen if set(row) != {blocks.pad_id}]
    assert len(real) == len({tuple(row) for row in real}) == 7 and len(seen) == 8
    assert sum(batch.supervised_tokens for step in epoch for batch in step.micro_batches) == blocks.supervised_tokens


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that any user can get to, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp()).resolve()
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def without_rights() -> Iterator[None]:
    """Root may read everything: then as a user who may not."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def rows_in(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        written(folder / name, [{"text": f"a river {n}"} for n in range(30)])
    return folder


FORBIDDEN = [("", 0), ("", 0o444), ("b", 0), ("b", 0o444), ("a.jsonl", 0), ("b/c.jsonl", 0)]


@pytest.mark.parametrize(("forbidden", "mode"), FORBIDDEN)
def test_fault_41_what_may_not_be_read_in_a_folder_is_named(reachable, forbidden, mode):
    folder = rows_in(reachable / "rows", "a.jsonl", "b/c.jsonl")
    place = folder / forbidden
    place.chmod(mode)
    try:
        with without_rights():
            message = refusal(folder)
    finally:
        place.chmod(0o755)
    assert str(place) in message and "Permission denied" in message


def test_fault_41_a_file_that_may_not_be_read_is_named(reachable):
    file = rows_in(reachable, "a.jsonl") / "a.jsonl"
    file.chmod(0)
    with without_rights():
        message = refusal(file)
    assert message.startswith(f"{file}: ") and "Permission denied" in message


@pytest.mark.parametrize("target", ["gone", "gone/rows.jsonl", "dangling"])
@pytest.mark.parametrize("name", ["dangling", "b/dangling", "dangling.jsonl"])
def test_fault_41_a_link_to_nothing_is_named(tmp_path, name, target):
    folder = rows_in(tmp_path / "rows", "a.jsonl", "b/c.jsonl")
    (folder / name).symlink_to(target)
    assert f"{folder / name} in the folder is a link to nothing" in refusal(folder)


@pytest.mark.parametrize("name", ["pipe", "pipe.jsonl"])
def test_fault_41_what_is_neither_file_nor_folder_is_named(tmp_path, name):
    folder = rows_in(tmp_path / "rows", "a.jsonl")
    os.mkfifo(folder / name)
    assert f"{folder / name} in the folder is no regular file" in refusal(folder)


def test_fault_41_linked_files_and_folders_are_read_and_circles_of_links_end(tmp_path):
    elsewhere = rows_in(tmp_path / "elsewhere", "b.jsonl", "deeper/c.jsonl")
    folder = rows_in(tmp_path / "rows", "a.jsonl", ".hidden/d.jsonl")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "e.jsonl").symlink_to(elsewhere / "b.jsonl")
    for place in (folder / "self", elsewhere / "deeper" / "back"):
        place.symlink_to(folder)
    (elsewhere / "again").symlink_to(elsewhere / "deeper")  # a folder is read once
    rows, counts = read(folder)
    assert len(rows) == counts["rows_read"] == 4 * 30
    assert len({feed.name for feed in opened(folder).feeds}) == 4
