"""mode=preview as a page: documents by block, and the data in figures."""

import re
from dataclasses import replace

import pytest

from tests.support.records import preview_record, section, shown


def test_each_document_has_a_heading_with_its_number_tokens_and_targets_and_padding_is_summed_up() -> None:
    text = shown(preview_record())
    assert "the first 2 of 1,340 in an epoch, unshuffled" in section(text, "Training blocks")[0]
    block = section(text, "Block 2")
    assert block[0].startswith("Block 2 2 documents, 16 of 64 tokens, 8 supervised")
    headings = [line.rstrip("─ ") for line in block if line.startswith("── ")]
    assert headings == [
        "── document 1,205 12 tokens, 5 supervised",
        "── document 3 4 tokens, 3 supervised",
        "── 48 padding",
    ]
    full = replace(preview_record().blocks[0], padding=0)
    assert "padding" not in shown(preview_record(blocks=(full,)))


def test_without_blocks_the_figures_stand_alone() -> None:
    text = shown(preview_record(blocks=()))
    assert "supervised tokens" in text and "Block" not in text and "«supervised" not in text


def test_the_table_has_each_figure_once() -> None:
    expected = """rows read 4,330
rows dropped: no answer 13
rows truncated 2
training rows 4,101
documents 4,102 in an epoch
shortest document 4 tokens
longest document 17 tokens
tokens 80,000 in an epoch
supervised tokens 20,000 25.0 % of the tokens
blocks 1,340 97.3 % filled
validation documents 216
validation rows 216 in 3 blocks"""
    assert section(shown(preview_record()), "Data")[3:] == expected.splitlines()


def test_the_number_of_rows_in_a_stream_is_not_known_rather_than_0() -> None:
    assert "training rows not known" in section(shown(preview_record(train_rows=0)), "Data")


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({}, "loss on auto → assistant in 4,100 rows, all in 1 row"),
        ({"loss_on": "assistant", "loss_on_found": {"assistant": 5}}, "loss on assistant in 5 rows"),
        ({}, "blocks 1,340 blocks of 64 positions"),
        ({"widths": ((32, 1), (64, 7))}, "blocks 1 block of 32, 7 blocks of 64 positions"),
        (
            {"counts": {"rows_read": 9, "turns_closed_by_next_turn_<|user|>": 2, "turns_without_end_token": 1}},
            "ends <|user|> ends 2 answers, as the opening of what follows; no token ends 1",
        ),
    ],
)
def test_the_head_says_what_was_chosen(changes: dict[str, object], fact: str) -> None:
    assert fact in " ".join(shown(preview_record(**changes)).split())


def test_the_histogram_has_a_bar_for_a_single_document() -> None:
    lines = section(shown(preview_record()), "Lengths")
    bars = {line.split()[0]: line.count("━") for line in lines if "━" in line}
    assert bars == {"4": 24, "11": 1} and re.match("4 to 10 4,100 ", lines[3])
