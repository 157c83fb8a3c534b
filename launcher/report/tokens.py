"""The text of documents on a console: supervised text and special tokens in colour, or between marks without it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from launcher.records.preview import TextPart
from launcher.report.console import literal

SUPERVISED, OTHER, SPECIAL = "green", "dim", "reverse"


@dataclass(frozen=True)
class Marks:
    """What stands before and after supervised text and special tokens, and where a line of the data ends."""

    supervised: tuple[str, str]
    special: tuple[str, str]
    line_end: str
    lookalikes: re.Pattern[str]  # in the data, where they would be taken for a mark: shown as escapes

    def of(self, part: TextPart) -> str:
        """The text of a part with its line ends marked; of a special token, between its marks."""
        text = part.text if part.special else self.lookalikes.sub(lambda match: _escaped(match[0]), part.text)
        before, after = self.special if part.special else ("", "")
        return before + text.replace("\n", self.line_end + "\n") + after


def _escaped(text: str) -> str:
    return "".join(f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}" for char in text)


COLOURED = Marks(("", ""), ("", ""), "↵", re.compile("↵"))
PLAIN_MARKS = Marks(("«", "»"), ("⟦", "⟧"), "↵", re.compile("[«»⟦⟧↵]"))
PLAIN_ASCII = Marks(  # doubled brackets; a single one at an end of the part, where a mark may stand beside it
    ("<<", ">>"), ("[[", "]]"), "\\n", re.compile(r"<<+|>>+|\[\[+|]]+|\A[<>\[\]]|[<>\[\]]\Z|\\(?=n)")
)


def marks_of(console: Console) -> Marks:
    """The marks that a console needs: none where it has colour."""
    if console.color_system is not None and not console.no_color:
        return COLOURED
    return PLAIN_ASCII if console.options.ascii_only else PLAIN_MARKS


def tokens_text(parts: Sequence[TextPart], marks: Marks) -> Text:
    """The text of one document with its supervision, special tokens and line ends visible."""
    text, supervised = Text(), False
    for part in parts:
        if part.supervised != supervised:
            text.append(marks.supervised[supervised])
            supervised = part.supervised
        style = f"{SUPERVISED if supervised else OTHER} {SPECIAL if part.special else ''}"
        text.append_text(literal(marks.of(part), style))
    text.append(marks.supervised[1] if supervised else "")
    if text.plain.endswith("\n"):
        text.right_crop(1)  # the line end is marked, and no empty line follows it in the data
    return text
