"""mode=preview on the console: supervision and special tokens are seen with colour and without, data stays text."""

import io
import re
import unicodedata
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from launcher.records.preview import BlockPreview, DocumentPreview, LengthBin, PreviewRecord, TextPart
from launcher.report import make_console, preview_page
from launcher.report.preview import COLOURED, PLAIN, PLAIN_ASCII, Marks, document_text

QUESTION = DocumentPreview(
    1_205, 12, 5,
    (
        TextPart("<|user|>", False, special=True), TextPart("Was heißt 你好?\nSay it.", False),
        TextPart("<|assistant|>", False, special=True), TextPart("Hello 👍", True),
        TextPart("<|end|>", True, special=True),
    ),
)  # fmt: skip
PLAIN_TEXT = DocumentPreview(3, 4, 3, (TextPart("a", False), TextPart(" river\n", True)))


def record(*documents: DocumentPreview, **changes: Any) -> PreviewRecord:
    block = BlockPreview(64, documents or (QUESTION, PLAIN_TEXT), padding=48)
    made = PreviewRecord(
        recipe="own", model="/models/base", tokenizer="LlamaTokenizer, 4,096 tokens", template="llama3",
        loss_on="auto", loss_on_found={"assistant": 4_100, "all": 1}, batching="packed", max_length=64,
        widths=((64, 1_340),), blocks=(block, block), total_blocks=1_340, part="an epoch",
        train_rows=4_101, documents=4_102, tokens=80_000, supervised_tokens=20_000, fill=0.973,
        lengths=(LengthBin(4, 10, 4_100), LengthBin(11, 17, 2)),
        validation_rows=216, validation_blocks=3,
        counts={
            "rows_read": 4_330, "rows_dropped_no_answer": 13, "truncated": 2, "documents": 4_102, "tokens": 80_000,
            "supervised_tokens": 20_000, "validation_documents": 216,
        },
        notes=("data: read from the cache",),
    )  # fmt: skip
    return replace(made, **changes)


def page(shown: PreviewRecord, console: Console | None = None) -> str:
    stream = io.StringIO()
    console = console or make_console(stream)
    console.file = stream
    preview_page(console, shown)
    return stream.getvalue()


def terminal(*, width: int = 100, colour: bool = True) -> Console:
    """With colours, or with those that NO_COLOR forbids."""
    return Console(width=width, force_terminal=True, color_system="standard", no_color=not colour)


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


def test_without_colour_supervision_and_special_tokens_are_marked_and_a_legend_says_how() -> None:
    without_any = Console(width=100, force_terminal=True, color_system=None, no_color=False)
    for console in (None, terminal(colour=False), without_any):
        found = lines(without_codes(page(record(), console)))
        assert "⟦<|user|>⟧Was heißt 你好?↵" in found
        assert "Say it.⟦<|assistant|>⟧«Hello 👍⟦<|end|>⟧»" in found
        assert "a« river↵" in found and found[found.index("a« river↵") + 1] == "»"
        assert any("«supervised" in line and "⟦special token⟧" in line and "↵ line end" in line for line in found)


def test_with_colour_supervision_and_special_tokens_differ_in_style() -> None:
    text = page(record(), terminal())
    assert "«" not in text and "⟦" not in text
    styles = {
        part: re.findall(rf"\x1b\[([\d;]+)m[^\x1b]*{re.escape(part)}", text)[-1]
        for part in ("Say it.", "<|user|>", "Hello 👍", "<|end|>")
    }
    assert len(set(styles.values())) == 4
    assert "32" in styles["Hello 👍"].split(";") and "32" in styles["<|end|>"].split(";")
    assert "32" not in styles["Say it."].split(";") and "32" not in styles["<|user|>"].split(";")
    assert "7" in styles["<|user|>"].split(";") and "7" in styles["<|end|>"].split(";")


def test_plain_text_carries_no_control_codes_and_a_poor_encoding_gets_ascii() -> None:
    assert "\x1b" not in page(record())
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    preview_page(make_console(stream), record())
    stream.flush()
    text = stream.buffer.getvalue().decode("ascii")
    assert "[[<|assistant|>]]<<Hello \\U0001f44d[[<|end|>]]>>" in text and "\\n line end" in text


ALIKE = "a « b » c ⟦d⟧ ↵ e << f >> [[g]] \\n [x] < y"


def plain(*parts: TextPart, marks: Marks) -> str:
    return document_text(parts, marks).plain


def test_what_looks_like_a_mark_in_the_data_is_shown_as_an_escape() -> None:
    shown = plain(TextPart(ALIKE, False), marks=PLAIN)
    assert shown == "a \\xab b \\xbb c \\u27e6d\\u27e7 \\u21b5 e << f >> [[g]] \\n [x] < y"
    assert plain(TextPart(ALIKE, True), marks=COLOURED) == ALIKE.replace("↵", "\\u21b5")
    shown = plain(TextPart(ALIKE, True), TextPart("<", False), TextPart("]x[", True), marks=PLAIN_ASCII)
    assert shown == (
        "<<a « b » c ⟦d⟧ ↵ e \\x3c\\x3c f \\x3e\\x3e \\x5b\\x5bg\\x5d\\x5d \\x5cn [x] < y>>\\x3c<<\\x5dx\\x5b>>"
    )
    special = TextPart("[INST]", False, special=True)
    assert plain(special, TextPart("<a>\n", True), marks=PLAIN_ASCII) == "[[[INST]]]<<\\x3ca>\\n\n>>"


@pytest.mark.parametrize("colour", [False, True])
def test_nothing_of_the_data_is_obeyed_by_terminal_or_markup(colour: bool) -> None:
    evil = "\x1b[31m\x1b]0;title\x07\x9b2J\r\b [bold]x[/bold] [/] :smile: \ud800"
    hostile = DocumentPreview(
        1, 3, 1, (TextPart(evil, False), TextPart(evil, True), TextPart(evil, False, special=True))
    )
    text = page(
        record(hostile, notes=(evil,), template=evil, model=evil, recipe=evil, counts={evil: 1}),
        terminal(width=300) if colour else None,
    )
    assert not set(without_codes(text)) & {"\x1b", "\x07", "\x9b", "\r", "\b", "\ud800"}
    assert text.count("[bold]x[/bold] [/] :smile:") >= 3
    assert "\\x1b[31m\\x1b]0;title\\x07\\x9b2J\\r\\x08" in text


def test_no_character_of_the_data_hides_or_reorders_what_stands_beside_it() -> None:
    unseen = [chr(n) for n in (*range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xAD, 0xFEFF)]
    unseen = [char for char in unseen if unicodedata.category(char) != "Cn"] + ["\u061c", "\U000e0041"]
    ordinary = "مرحبا नमस्ते 你好 👍 é\u0301"
    text = page(record(DocumentPreview(1, 3, 1, (TextPart(ordinary, True), TextPart("".join(unseen), False)))))
    joined = "".join(text.split())  # as if it were not wrapped
    assert not set(text) & set(unseen) and ordinary.replace(" ", "") in joined
    assert "\\u200b\\u200c" in joined and all(char.encode("unicode_escape").decode() in joined for char in unseen)


def test_each_document_has_a_rule_with_its_number_tokens_and_targets_and_padding_is_summed_up() -> None:
    found = lines(page(record()))
    rules = [line for line in found if line.startswith("── ")]
    assert rules[0].startswith("── document 1,205  12 tokens, 5 supervised ──")
    assert rules[1].startswith("── document 3  4 tokens, 3 supervised ──")
    assert rules[2].startswith("── 48 padding ──")
    assert len(rules) == 6, "two blocks"
    assert any(line.startswith("─ Block 2  2 documents, 16 of 64 tokens, 8 supervised") for line in found)
    assert any("first 2 of 1,340" in line for line in found)
    full = replace(record().blocks[0], padding=0)
    assert "padding" not in page(record(blocks=(full,)))


def test_without_blocks_the_figures_stand_alone() -> None:
    text = page(record(blocks=()))
    assert "supervised tokens" in text and "Block" not in text and "«supervised" not in text


@pytest.mark.parametrize(
    ("label", "figures"),
    [
        ("rows read", "4,330"),
        ("rows dropped: no answer", "13"),
        ("truncated", "2"),
        ("training rows", "4,101"),
        ("documents", "4,102 in an epoch"),
        ("shortest document", "4 tokens"),
        ("longest document", "17 tokens"),
        ("tokens", "80,000 in an epoch"),
        ("supervised tokens", "20,000 25.0 % of the tokens"),
        ("blocks", "1,340 97.3 % filled"),
        ("validation documents", "216"),
        ("validation rows", "216 in 3 blocks"),
    ],
)
def test_the_table_has_each_figure_once(label: str, figures: str) -> None:
    text = page(record())
    table = [" ".join(line.split()) for line in text[text.index("─ Data") :].splitlines()]
    [line] = [line for line in table if re.match(rf"{label} [\d,]+", line)]
    assert line.startswith(f"{label} {figures}")


def test_the_rows_of_a_stream_are_not_said_to_be_none() -> None:
    assert re.search("training rows +not known", page(record(train_rows=0)))


def test_the_head_says_what_auto_came_to_and_the_histogram_has_a_bar_for_a_single_document() -> None:
    text = page(record())
    assert "auto → assistant in 4,100 rows, all in 1 row" in text
    assert "1,340 blocks of 64 positions" in text
    bars = {line.split()[0]: line.count("━") for line in text[text.index("─ Lengths") :].splitlines() if "━" in line}
    assert bars == {"4": 32, "11": 1}
    explicit = page(record(loss_on="assistant", loss_on_found={"assistant": 5}, widths=((32, 1), (64, 7))))
    assert "assistant in 5 rows" in explicit and "→" not in explicit
    assert "1 block of 32, 7 blocks of 64 positions" in explicit


@pytest.mark.parametrize("width", [40, 80])
def test_long_documents_wrap_and_lose_nothing(width: int) -> None:
    words = " ".join(f"word{n}" for n in range(200)) + " " + "x" * 300
    text = page(record(DocumentPreview(1, 400, 399, (TextPart(words, True),))), terminal(width=width, colour=False))
    plain = without_codes(text)
    assert max(map(len, plain.splitlines())) <= width
    assert plain.count("x") >= 300 and all(f"word{n}" in plain for n in range(200))
