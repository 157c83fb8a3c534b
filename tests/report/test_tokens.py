"""The text of documents: supervision and special tokens are seen with colour and without, data stays text."""

import re
import unicodedata
from typing import Any

import pytest
from rich.console import Console

from launcher.records.preview import DocumentPreview, TextPart
from launcher.report.tokens import COLOURED, PLAIN_ASCII, PLAIN_MARKS, Marks, tokens_text
from tests.support.records import ESCAPED, HOSTILE, preview_record, shown, without_codes


def terminal(*, width: int = 100, no_color: bool = False, color_system: Any = "standard") -> Console:
    return Console(width=width, force_terminal=True, color_system=color_system, no_color=no_color)


@pytest.mark.parametrize("console", [Console(width=100), terminal(no_color=True), terminal(color_system=None)])
def test_without_colour_supervision_and_special_tokens_are_marked_and_a_legend_says_how(console: Console) -> None:
    lines = [line.strip() for line in without_codes(shown(preview_record(), console)).splitlines()]
    assert "⟦<|user|>⟧Was heißt 你好?↵" in lines
    assert "Say it.⟦<|assistant|>⟧«Hello 👍⟦<|end|>⟧»" in lines
    assert "a« river↵" in lines and lines[lines.index("a« river↵") + 1] == "»"
    assert "«supervised: the loss sees it»  context only  ⟦special token⟧  line end↵" in lines


def test_with_colour_supervision_and_special_tokens_differ_in_style() -> None:
    text = shown(preview_record(), terminal())
    assert "«" not in text and "⟦" not in text
    supervised, special = "32", "7"  # green, reverse
    for part, expected in {
        "Say it.": set(),
        "<|user|>": {special},
        "Hello 👍": {supervised},
        "<|end|>": {supervised, special},
    }.items():
        style = re.findall(rf"\x1b\[([\d;]+)m[^\x1b]*{re.escape(part)}", text)[-1]
        assert set(style.split(";")) & {supervised, special} == expected, part


LOOKALIKES = "a « b » c ⟦d⟧ ↵ e << f >> [[g]] \\n [x] < y"


@pytest.mark.parametrize(
    ("marks", "parts", "expected"),
    [
        (
            PLAIN_MARKS,
            [TextPart(LOOKALIKES, False)],
            "a \\xab b \\xbb c \\u27e6d\\u27e7 \\u21b5 e << f >> [[g]] \\n [x] < y",
        ),
        (COLOURED, [TextPart(LOOKALIKES, True)], LOOKALIKES.replace("↵", "\\u21b5")),
        (
            PLAIN_ASCII,
            [TextPart(LOOKALIKES, True), TextPart("<", False), TextPart("]x[", True)],
            "<<a « b » c ⟦d⟧ ↵ e \\x3c\\x3c f \\x3e\\x3e \\x5b\\x5bg\\x5d\\x5d \\x5cn [x] < y>>\\x3c<<\\x5dx\\x5b>>",
        ),
        (
            PLAIN_ASCII,
            [TextPart("[INST]", False, special=True), TextPart("<a>\n", True)],
            "[[[INST]]]<<\\x3ca>\\n\n>>",
        ),
    ],
)
def test_what_looks_like_a_mark_in_the_data_is_shown_as_an_escape(
    marks: Marks, parts: list[TextPart], expected: str
) -> None:
    assert tokens_text(parts, marks).plain == expected


@pytest.mark.parametrize("console", [Console(width=300), terminal(width=300)])
def test_nothing_in_a_document_is_obeyed_by_terminal_or_markup(console: Console) -> None:
    parts = (TextPart(HOSTILE, False), TextPart(HOSTILE, True), TextPart(HOSTILE, False, special=True))
    text = without_codes(shown(preview_record(DocumentPreview(1, 3, 1, parts)), console))
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\r", "\b", "\ud800"}
    assert "".join(text.split()).count(ESCAPED) == 6, "three in each of two blocks"


def test_no_character_of_the_data_hides_or_reorders_the_text_beside_it() -> None:
    codes = (*range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xAD, 0xFEFF, 0x61C, 0xE0041)
    unseen = [chr(code) for code in codes if unicodedata.category(chr(code)) != "Cn"]
    ordinary = "مرحبا नमस्ते 你好 👍 é\u0301"
    text = shown(preview_record(DocumentPreview(1, 3, 1, (TextPart(ordinary, True), TextPart("".join(unseen), False)))))
    joined = "".join(text.split())  # as if it were not wrapped
    assert not set(text) & set(unseen) and ordinary.replace(" ", "") in joined
    assert len(unseen) > 20 and all(char.encode("unicode_escape").decode() in joined for char in unseen)


@pytest.mark.parametrize("width", [40, 80])
def test_long_documents_wrap_and_lose_nothing(width: int) -> None:
    words = " ".join(f"word{n}" for n in range(200)) + " " + "x" * 300
    document = DocumentPreview(1, 400, 399, (TextPart(words, True),))
    text = without_codes(shown(preview_record(document), terminal(width=width, no_color=True)))
    assert max(map(len, text.splitlines())) <= width
    assert text.count("x") >= 600 and all(text.count(f"word{n}") >= 2 for n in range(200))
