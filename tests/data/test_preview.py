"""The record of mode=preview: it shows what a step is given, as readable text. No model is needed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from launcher.data.documents import Document, Documents
from launcher.data.pack.blocks import Blocks
from launcher.data.prepare import PreparedData
from launcher.data.preview import block_preview, histogram, preview_record, text_parts
from launcher.recipe.schema import Recipe
from launcher.records.preview import DocumentPreview, PreviewRecord, TextPart
from tests.conftest import TINY

MIXED = "Say 你好 and 👍🏽, é, \ufffd or nothing at all. "


@pytest.fixture(scope="module")
def tokenizer():
    """The shipped one: byte level, so that most characters beyond ASCII are several tokens."""
    return AutoTokenizer.from_pretrained(TINY / "base")


@pytest.fixture(scope="module")
def sentencepiece_like():
    """Words begin with a mark that stands for the blank, other characters are bytes; decoding drops the first blank."""
    words = ["▁", *(f"▁{word}" for word in ("Say", "and", "or", "nothing", "at", "all.")), ",", "S", "▁é"]
    vocabulary = {token: index for index, token in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    merges: list[tuple[str, str]] = []
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def document(tokenizer: Any, *pieces: tuple[str, bool]) -> Document:
    """A document of (text, supervised) pieces, tokenised one by one."""
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text, _ in pieces]
    supervised = [np.full(len(piece), learned) for piece, (_, learned) in zip(ids, pieces, strict=True)]
    return Document(np.concatenate(ids).astype(np.int32), np.concatenate(supervised))


def chat(tokenizer: Any, question: str, answer: str) -> Document:
    return document(tokenizer, (f"<|user|>{question}<|end|><|assistant|>", False), (f"{answer}<|end|>", True))


def blocks_of(*documents: Document, blocks: Sequence[Sequence[int]]) -> Blocks:
    """Blocks of 128 positions with these documents."""
    sizes, placed = np.array([len(block) for block in blocks]), np.concatenate(blocks).astype(np.int64)
    widths = np.full(len(blocks), 128, np.int32)
    return Blocks.of(Documents.of(documents), placed, block_sizes=sizes, widths=widths, pad_id=0)


def parts_of(tokenizer: Any, ids: Sequence[int], targets: Sequence[bool]) -> list[TextPart]:
    return list(text_parts(ids, targets, tokenizer))


def parts_of_pieces(tokenizer: Any, *pieces: tuple[str, bool]) -> list[TextPart]:
    whole = document(tokenizer, *pieces)
    return parts_of(tokenizer, whole.input_ids.tolist(), whole.supervised.tolist())


def test_a_document_reads_as_runs_of_equal_supervision_and_special_tokens_by_name(tokenizer):
    pieces = ("<|user|>A word?<|end|><|assistant|>", False), ("An answer.<|end|>", True)
    assert parts_of_pieces(tokenizer, *pieces) == [
        TextPart("<|user|>", False, special=True),
        TextPart("A word?", False),
        TextPart("<|end|>", False, special=True),
        TextPart("<|assistant|>", False, special=True),
        TextPart("An answer.", True),
        TextPart("<|end|>", True, special=True),
    ]


def test_the_name_of_a_special_token_written_in_the_data_stays_text(tokenizer):
    backend = Tokenizer.from_file(str(TINY / "base" / "tokenizer.json"))
    backend.encode_special_tokens = True
    ids = backend.encode("a <|end|> b", add_special_tokens=False).ids
    assert parts_of(tokenizer, ids, [True] * len(ids)) == [TextPart("a <|end|> b", True)]


def test_control_tokens_without_a_role_are_special_and_ordinary_added_words_are_not():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    tokenizer.add_tokens([AddedToken("<|header|>", special=True), AddedToken("<think>", special=False)])
    [header, think] = parts_of(tokenizer, tokenizer.convert_tokens_to_ids(["<|header|>", "<think>"]), [True, True])
    assert (header.special, think.special) == (True, False)


@pytest.mark.parametrize("kind", ["tokenizer", "sentencepiece_like"])
def test_whatever_the_mask_the_parts_together_are_the_text(kind, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer(MIXED * 2, add_special_tokens=False).input_ids
    whole = tokenizer.decode(ids)
    assert "你好" in whole and len(ids) > len(MIXED.split()) * 2
    for seed in range(60):
        targets = np.repeat(np.random.default_rng(seed).random(len(ids)) < 0.5, 1 + seed % 7)[: len(ids)]
        parts = parts_of(tokenizer, ids, targets.tolist())
        assert "".join(part.text for part in parts) == whole
        assert len(parts) > 1


def test_a_character_is_never_torn_where_supervision_begins_within_it(tokenizer):
    ids = tokenizer("你好", add_special_tokens=False).input_ids
    assert len(ids) == 6, "a token for each byte, or the test shows nothing"
    for first in range(1, 6):
        parts = parts_of(tokenizer, ids, [position >= first for position in range(6)])
        both = [TextPart("你", False), TextPart("好", True)]
        assert parts == ([TextPart("你好", True)] if first < 3 else both)


def test_a_replacement_character_of_the_data_does_not_take_the_next_word_along(tokenizer):
    parts = parts_of_pieces(tokenizer, ("a\ufffd", False), (" word", True))
    assert parts == [TextPart("a\ufffd", False), TextPart(" word", True)]


def test_half_a_character_at_the_end_of_a_cut_document_is_shown_as_such(tokenizer):
    ids = tokenizer("a👍", add_special_tokens=False).input_ids[:-1]
    assert [part.text for part in parts_of(tokenizer, ids, [True] * len(ids))] == ["a\ufffd"]


def supervised_text(shown: DocumentPreview) -> str:
    return "".join(part.text for part in shown.parts if part.supervised)


def test_a_block_shows_its_documents_in_their_order_with_targets_and_padding(tokenizer):
    chats = [chat(tokenizer, f"Question {n}", f"Answer {n}.") for n in range(3)]
    block = block_preview(blocks_of(*chats, blocks=[[1], [2, 0]]), 1, tokenizer=tokenizer)
    assert [shown.number for shown in block.documents] == [3, 1]
    assert [supervised_text(shown) for shown in block.documents] == ["Answer 2.<|end|>", "Answer 0.<|end|>"]
    figures = [(len(chats[index]), chats[index].supervised.sum()) for index in (2, 0)]
    assert [(shown.tokens, shown.targets) for shown in block.documents] == figures
    assert (block.width, block.padding) == (128, 128 - len(chats[2]) - len(chats[0]))


def test_a_token_that_nothing_predicts_is_not_shown_as_supervised(tokenizer):
    text = document(tokenizer, ("<|begin|>some text<|end|>", True))
    blocks = blocks_of(text, text, blocks=[[0, 1]])
    for shown in block_preview(blocks, 0, tokenizer=tokenizer).documents:
        assert shown.parts[0] == TextPart("<|begin|>", False, special=True)
        assert shown.targets == shown.tokens - 1
        assert supervised_text(shown) == "some text<|end|>"
    assert blocks.supervised_tokens == 2 * (len(text) - 1)


def record_of(
    blocks: Blocks, tokenizer: Any, *, shown: int = 2, accumulation: int = 1, world_size: int = 1, **changes: Any
) -> PreviewRecord:
    fields: dict[str, Any] = {
        "train": blocks, "validation": None, "counts": {"rows_read": 4, "rows_dropped_empty": 1}, "examples": (),
        "train_rows": 3, "validation_rows": 0, "loss_on": {"assistant": 3}, "template": "the tokenizer's",
        "identity": "0", "content": "0", "notes": ("a note",),
    }  # fmt: skip
    recipe = Recipe.model_validate({"train": {"steps": 1, "accumulation": accumulation}, "data": {"max_length": 128}})
    data = PreparedData(**(fields | changes))
    source = "/models/base"
    return preview_record(
        data, tokenizer, recipe=recipe, name="own", source=source, blocks=shown, world_size=world_size
    )


def test_the_record_holds_the_figures_of_the_blocks(tokenizer):
    chats = [chat(tokenizer, "Q" * n, f"Answer {n}.") for n in (1, 5, 40)]
    blocks = blocks_of(*chats, blocks=[[0, 1], [2], [2]])  # a weight repeats document 2
    record = record_of(blocks, tokenizer)
    lengths = [len(chats[index]) for index in (0, 1, 2, 2)]
    assert (record.documents, record.tokens) == (4, sum(lengths)) == (4, blocks.tokens)
    assert record.supervised_tokens == blocks.supervised_tokens > 0
    assert record.fill == pytest.approx(sum(lengths) / (3 * 128))
    assert (record.lengths[0].shortest, record.lengths[-1].longest) == (min(lengths), max(lengths))
    assert sum(length.documents for length in record.lengths) == 4
    assert (len(record.blocks), record.total_blocks, record.widths) == (2, 3, ((128, 3),))
    assert (record.counts, record.notes) == ({"rows_read": 4, "rows_dropped_empty": 1}, ("a note",))
    assert (record.validation_rows, record.validation_blocks) == (0, 0)
    validated = record_of(blocks, tokenizer, validation=blocks, validation_rows=3)
    assert (validated.validation_rows, validated.validation_blocks) == (3, 3)
    assert [len(record_of(blocks, tokenizer, shown=shown).blocks) for shown in (0, 1, 99)] == [0, 1, 3]


@pytest.mark.parametrize(("accumulation", "world_size", "holds"), [(1, 3, 0), (4, 1, 4), (2, 2, 4)])
def test_a_step_larger_than_the_data_is_noted(tokenizer, accumulation, world_size, holds):
    blocks = blocks_of(chat(tokenizer, "Q", "A."), blocks=[[0], [0], [0]])
    notes = record_of(blocks, tokenizer, accumulation=accumulation, world_size=world_size).notes
    said = f"a step holds {holds} blocks and the data only 3: lower train.micro_batch or train.accumulation"
    assert notes == ("a note", *([said] if holds else []))


@pytest.mark.parametrize(
    "lengths", [[7], [7, 7, 7], [1, 2], [3, 12], [3, 13], [1, 500, 77, 77, 499], list(range(1, 99))]
)
def test_every_document_is_in_one_bin_of_the_histogram(lengths):
    bins = histogram(np.array(lengths))
    assert 1 <= len(bins) <= 10
    assert (bins[0].shortest, bins[-1].longest) == (min(lengths), max(lengths))
    for before, after in zip(bins, bins[1:], strict=False):
        assert after.shortest == before.longest + 1
    assert [b.documents for b in bins] == [sum(b.shortest <= n <= b.longest for n in lengths) for b in bins]
