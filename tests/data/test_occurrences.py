"""How often trained tokens occur in the data is counted and said; one that never does is a warning."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launcher.data import occurrences as module
from launcher.data.documents import Documents
from launcher.data.occurrences import occurrences, with_occurrences
from launcher.data.pack.blocks import Blocks
from launcher.data.prepare import PreparedData

DOCUMENTS = [([7, 1, 7], [1, 0, 1]), ([7, 7], [1, 1]), ([2, 3], [0, 1])]  # ids, and which are supervised
TOKENIZER: Any = SimpleNamespace(convert_ids_to_tokens=lambda index: f"<{index}>")


@pytest.fixture
def blocks() -> Blocks:
    """Two blocks; the second document lies in both, the third, which validates, in none."""
    ids, supervised = (np.concatenate([document[part] for document in DOCUMENTS]) for part in (0, 1))
    documents = Documents(ids.astype(np.int32), supervised.astype(bool), np.array([0, 3, 5, 7]))
    sizes, widths = np.array([2, 1]), np.array([8, 8], dtype=np.int32)
    return Blocks.of(documents, np.array([0, 1, 1]), block_sizes=sizes, widths=widths, pad_id=0)


@pytest.mark.parametrize("chunk", [1, 100])
def test_each_occurrence_in_a_block_counts_and_the_first_token_of_a_document_is_no_target(
    blocks: Blocks, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    read, written = occurrences(blocks, (1, 3, 7, 900))
    assert read.tolist() == [1, 0, 2 + 2 * 2, 0] and written.tolist() == [0, 0, 1 + 2 * 1, 0]


def prepared(blocks: Blocks) -> PreparedData:
    return PreparedData(
        train=blocks, validation=None, counts={}, examples=(), train_rows=2, validation_rows=0, loss_on={},
        template="none", identity="", content="", notes=("of before",),
    )  # fmt: skip


def test_a_token_that_never_occurs_is_a_warning_and_the_others_are_counted(blocks: Blocks) -> None:
    never, counts, before = with_occurrences(prepared(blocks), TOKENIZER, (3, 7)).notes
    assert "<3> (id 3) never occurs in the training data (an epoch)" in never and "<7>" not in never
    assert counts.endswith("in an epoch, times read (as a target): <7> (id 7) 6 (3)") and before == "of before"
    assert with_occurrences(prepared(blocks), TOKENIZER, ()).notes == ("of before",)
