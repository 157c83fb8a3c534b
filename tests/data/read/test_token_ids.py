"""Token ids prepared elsewhere, from the file to the documents."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.prepare import prepare
from launcher.data.preview import block_preview
from launcher.data.read.rows import TokenIds
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection
from tests.support.reading import read, refusal

IDS = [5, 6, 7, 8]


def rows_of(path, **keys):
    rows, counts = read(path, **keys)
    return [(row.input_ids.tolist(), masked(row)) for row in rows if isinstance(row, TokenIds)], counts


def masked(row):
    return None if row.supervised is None else row.supervised.tolist()


def prepared(path, tokenizer, **keys):
    data = DataSection.model_validate({"sources": [{"path": path}], "max_length": 64, "validation": 0, **keys})
    return prepare(data, tokenizer, seed=0)


def test_ids_stay_what_they_are_with_and_without_labels(write):
    labels = [-100, 6, -100, 8]
    rows, counts = rows_of(write([{"input_ids": IDS}, {"input_ids": IDS, "labels": labels}, {"input_ids": []}]))
    assert rows == [(IDS, None), (IDS, [False, True, False, True])]
    assert counts == {"rows_read": 3, "rows_dropped_empty": 1}


def test_padding_is_trimmed_at_both_ends_whatever_stands_there(write):
    row = {"input_ids": [0, 5, 6, -1], "attention_mask": [0, 1, 1, 0], "labels": [9, 5, -100, 9]}
    assert rows_of(write([row]))[0] == [([5, 6], [True, False])]
    rows, counts = rows_of(write([{"input_ids": IDS, "attention_mask": [0] * 4}]))
    assert not rows and counts["rows_dropped_empty"] == 1


def test_parquet_lists_of_ids_are_read(tmp_path):
    path = tmp_path / "ids.parquet"
    columns = {"input_ids": pa.array([IDS, IDS[:1]], pa.list_(pa.int32())), "labels": [[-100, 6, 7, 8], [5]]}
    pq.write_table(pa.table(columns), path)
    assert [ids for ids, _ in rows_of(path)[0]] == [IDS, IDS[:1]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input_ids": "1 2"}, 'found: "1 2"'),
        ({"input_ids": None}, "null"),
        ({"input_ids": [1, 2.5]}, "2.5"),
        ({"input_ids": [1, True]}, "true"),
        ({"input_ids": [1, None]}, "null"),
        ({"input_ids": [[1], [2]]}, "a list with a list"),
        ({"input_ids": [1, -1]}, "-1 at place 1"),
        ({"input_ids": [2**31]}, "2147483648 at place 0"),
        ({"input_ids": [2**70]}, "64 bits"),
        ({"input_ids": IDS, "labels": [5, 6]}, "2 numbers beside 4"),
        ({"input_ids": IDS, "labels": [6, 7, 8, -100]}, "6 beside the id 5 at place 0"),
        ({"input_ids": IDS, "attention_mask": [1, 0, 1, 1]}, "0 at place 1"),
        ({"input_ids": IDS, "attention_mask": [1, 1, 2, 1]}, "2 at place 2"),
        ({"input_ids": IDS, "attention_mask": [1]}, "1 numbers beside 4"),
    ],
)
def test_lists_that_do_not_fit_are_faults_and_their_neighbours_are_not(write, row, words):
    path = write([{"input_ids": IDS}, row])
    message = refusal(path)
    assert message.startswith(f"{path}:2: ") and words.lower() in message.lower()
    rows, counts = rows_of(path, bad_rows="skip")
    assert len(rows) == 1 and counts["rows_dropped_token_ids"] == 1


def test_a_row_with_ids_and_a_text_needs_a_format(write):
    path = write([{"input_ids": IDS, "text": "a river"}])
    assert "format: text or format: tokens" in refusal(path)
    assert rows_of(path, format="tokens")[0] == [(IDS, None)]


def test_documents_are_the_ids_without_frame_and_the_preview_shows_their_text(write, tokenizer):
    ids = tokenizer("a river and a lake", add_special_tokens=False).input_ids
    data = prepared(write([{"input_ids": ids, "labels": [*[-100] * (len(ids) - 2), *ids[-2:]]}]), tokenizer)
    [document] = [data.first_blocks.documents[0]]
    assert document.input_ids.tolist() == ids and document.supervised.sum() == 2
    assert data.loss_on == {"labels": 1} and data.counts["supervised_tokens"] == 2
    parts = block_preview(data.first_blocks, 0, tokenizer=tokenizer).documents[0].parts
    assert "".join(part.text for part in parts) == "a river and a lake"
    assert [part.supervised for part in parts] == [False, True]


@pytest.mark.parametrize(("loss_on", "targets"), [("auto", 1), ("all", 3)])
def test_the_labels_say_what_is_learned_unless_all_is_asked_for(write, tokenizer, loss_on, targets):
    path = write([{"input_ids": IDS, "labels": [-100, -100, -100, 8]}])
    assert prepared(path, tokenizer, loss_on=loss_on).counts["supervised_tokens"] == targets


@pytest.mark.parametrize("loss_on", ["assistant", "completion"])
def test_a_loss_on_that_ids_do_not_have_is_refused(write, tokenizer, loss_on):
    with pytest.raises(DataError, match=f"data.loss_on={loss_on} needs chats"):
        prepared(write([{"input_ids": IDS}]), tokenizer, loss_on=loss_on)


def test_an_id_that_the_tokenizer_lacks_is_a_fault(write, tokenizer):
    path = write([{"input_ids": IDS}, {"input_ids": [5, len(tokenizer)]}])
    with pytest.raises(DataError, match=f"rows.jsonl:2: token ids are those of .*\nFound: the id {len(tokenizer)}"):
        prepared(path, tokenizer)
    assert prepared(path, tokenizer, bad_rows="skip").counts["rows_dropped_token_ids"] == 1


def test_rows_without_a_label_that_is_learned_are_counted(write, tokenizer):
    path = write([{"input_ids": IDS}, {"input_ids": IDS, "labels": [5, -100, -100, -100]}])
    assert prepared(path, tokenizer).counts["rows_dropped_zero_supervised"] == 1


@pytest.mark.parametrize(("too_long", "lengths"), [("truncate", [64]), ("split", [64, 36]), ("drop", None)])
def test_too_long_rows_follow_the_recipe(write, tokenizer, too_long, lengths):
    path = write([{"input_ids": [5] * 100}, {"input_ids": IDS}])
    documents = prepared(path, tokenizer, too_long=too_long).first_blocks.documents
    assert np.diff(documents.offsets).tolist() == [*(lengths or []), 4]


def test_equal_ids_validate_together_whatever_their_labels_are(write, tokenizer):
    path = write([{"input_ids": IDS, "labels": IDS}, {"input_ids": [9, 9]}])
    held = write([{"input_ids": IDS}], name="held.jsonl")
    data = prepared(path, tokenizer, validation=held)
    assert (data.counts["rows_dropped_in_validation"], data.train_rows, data.validation_rows) == (1, 1, 1)


@pytest.mark.parametrize("key", ["completion_mask", "assistant_masks", "position_ids", "seq_lengths"])
def test_a_mask_of_another_name_and_rows_packed_elsewhere_are_refused_and_not_learned_whole(write, key):
    assert f'"{key}" is not honoured' in refusal(write([{"input_ids": IDS, key: [0, 1, 0, 1]}]))
    assert rows_of(write([{"input_ids": IDS, key: [0, 1, 0, 1]}]), unused="drop")[0] == [(IDS, None)]
