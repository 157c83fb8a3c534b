"""Parquet columns as writers really make them: lists of objects, dictionaries, large and view strings."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.read.rows import Conversation, Message, PlainText
from tests.support.reading import read

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
MESSAGE = pa.struct({"role": pa.string(), "content": pa.string()})
TEXTS = ["a river", "a lake", "a river"]


def table_of(path, arrays: dict[str, Any], **options: Any):
    pq.write_table(pa.table(arrays), path, **options)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(MESSAGE),
        pa.large_list(MESSAGE),
        pa.list_(pa.struct({"role": pa.string(), "content": pa.large_string(), "name": pa.string()})),
        pa.list_(MESSAGE, 2),
    ],
    ids=str,
)
def test_chats_are_read_from_lists_of_objects(tmp_path, kind):
    path = table_of(tmp_path / "chats.parquet", {"messages": pa.array([TURNS] * 3, kind)}, row_group_size=2)
    rows, counts = read(path)
    expected = (Message("user", "Hi"), Message("assistant", "Hello"))
    assert [row.messages for row in rows if isinstance(row, Conversation)] == [expected] * 3
    assert counts == {"rows_read": 3}


def test_chats_with_words_of_their_own_and_dictionaries_inside_are_read(tmp_path):
    turns = [{"speaker": turn["role"], "words": turn["content"]} for turn in TURNS]
    roles = pa.array([turn["speaker"] for turn in turns]).dictionary_encode()
    items = pa.StructArray.from_arrays(
        [roles, pa.array([turn["words"] for turn in turns], pa.large_string())], ["speaker", "words"]
    )
    path = table_of(tmp_path / "chats.parquet", {"dialogue": pa.ListArray.from_arrays([0, 2], items)})
    [row], _ = read(path, columns={"messages": "dialogue", "role": "speaker", "content": "words"})
    assert isinstance(row, Conversation) and [message.content for message in row.messages] == ["Hi", "Hello"]


def test_nested_prompts_and_completions_are_read(tmp_path):
    arrays = {
        name: pa.array([turns], pa.list_(MESSAGE)) for name, turns in (("prompt", TURNS[:1]), ("completion", TURNS[1:]))
    }
    [row], _ = read(table_of(tmp_path / "rows.parquet", arrays))
    assert isinstance(row, Conversation) and (len(row.messages), row.answer) == (2, 1)


@pytest.mark.parametrize(
    "array",
    [
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS, pa.large_string()).dictionary_encode(),
    ],
    ids=lambda array: str(array.type),
)
@pytest.mark.parametrize(
    "options", [{}, {"row_group_size": 1}, {"compression": "zstd", "use_dictionary": False}], ids=str
)
def test_texts_of_every_kind_of_string_are_read(tmp_path, array, options):
    rows, _ = read(table_of(tmp_path / "texts.parquet", {"text": array}, **options))
    assert [row.text for row in rows if isinstance(row, PlainText)] == TEXTS


def test_nulls_of_unused_lists_and_objects_are_no_faults(tmp_path):
    arrays = {"text": pa.array(["a river"]), "tools": pa.array([None], pa.list_(MESSAGE))}
    rows, counts = read(table_of(tmp_path / "rows.parquet", arrays))
    assert len(rows) == 1 and counts == {"rows_read": 1}
