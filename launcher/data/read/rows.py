"""What a row is: a conversation, a text or token ids, whatever its source and format. Later stages know neither.

source -> Feed -> RawRow (columns as they were read) -> Row (Conversation, PlainText or TokenIds); RowFault where one
fails
"""

import copyreg
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.credentials import shortened
from launcher.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
SKIP = "Fix the row, or set data.bad_rows=skip to drop such rows and count them."
NOT_MAPPED = " (not mapped)"  # added to the name of a column that gives way to the one that the user names
CORRECT_ENTRY = (
    "Correct the source's entry. If only some rows lack it, data.bad_rows=skip drops such rows and counts them."
)


@dataclass(frozen=True)
class Message:
    """`extra`: what else of a message the chat template gets, under the names that templates read. "tool_calls": a
    list of {"type", "function": {"name", "arguments": {}}, "id" if it has one}, "reasoning_content", "tool_call_id",
    "name".
    """

    role: str  # one of ROLES
    content: str  # may be empty beside tool calls
    extra: dict[str, Any] = field(default_factory=dict)
    train: bool | None = None  # the row's own word on whether the loss sees it

    @property
    def calls(self) -> list[dict[str, Any]]:
        return self.extra.get("tool_calls", [])

    @property
    def reasoning(self) -> str:
        return str(self.extra.get("reasoning_content", ""))

    @property
    def is_blank(self) -> bool:
        return not (self.content.strip() or self.calls or self.reasoning.strip())

    @property
    def said(self) -> str:
        """The content, then each tool call as a line of JSON: an answer as it is shown beside the model's."""
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in self.calls]
        return "\n".join([*([self.content] if self.content.strip() or not calls else []), *calls])


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    where: str  # its place in messages: "file:line" or "file row 7"
    answer: int | None = None  # index of the first message of the completion, in formats that mark one
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas, each {"type": "function", "function": {"name", ...}}

    @property
    def characters(self) -> int:
        extra = json.dumps([self.tools, [m.extra for m in self.messages]]) if self.has_extra else ""
        return sum(map(len, map(attrgetter("content"), self.messages))) + len(extra)

    @property
    def has_extra(self) -> bool:
        """Whether the chat template gets more than roles and contents."""
        return bool(self.tools) or any(map(attrgetter("extra"), self.messages))


@dataclass(frozen=True)
class PlainText:
    text: str
    where: str
    answer: int | None = None  # index of the first character of the completion, in formats that mark one

    @property
    def characters(self) -> int:
        return len(self.text)


@dataclass(frozen=True, eq=False)
class TokenIds:
    """Tokens as they were prepared elsewhere, N >= 1 of them."""

    input_ids: "NDArray[np.int32]"  # [N]
    supervised: "NDArray[np.bool_] | None"  # [N], by the row's labels; None: it has none
    where: str
    answer: None = None

    @property
    def characters(self) -> int:
        """A measure of its size, as of the other rows."""
        return len(self.input_ids)


Row = Conversation | PlainText | TokenIds


class RowFault(DataError):
    """One row that cannot be used. With data.bad_rows=skip it is counted as `rows_dropped_<reason>`."""

    def __init__(self, reason: str, *, where: str, rule: str, found: str, remedy: str = SKIP) -> None:
        super().__init__(f"{where}: {rule}\nFound: {found}\n{remedy}")
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickled without __init__, which does not take the stored `args`: worker processes return such faults."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


def wrong_type(where: str, rule: str, found: str, remedy: str = SKIP) -> RowFault:
    return RowFault("wrong_type", where=where, rule=rule, found=found, remedy=remedy)


CUT_OR_SKIP = "Cut the row into several, raise data.max_row_mib, or set data.bad_rows=skip to drop and count such rows."


def too_large(where: str, found: str, max_bytes: int, remedy: str = CUT_OR_SKIP) -> RowFault:
    rule = f"a row has at most data.max_row_mib={max_bytes / 2**20:.4g} MiB ({max_bytes:,} bytes)."
    return RowFault("too_large", where=where, rule=rule, found=found, remedy=remedy)


class RawRow(NamedTuple):
    """A row as its source holds it, before its format is known."""

    where: str
    fields: dict[str, Any]  # values by column
    null_filled: bool = False  # whether objects have null for the keys that only other rows have, as Arrow's do


@dataclass(frozen=True)
class Feed:
    """The rows of one file or one hub dataset. All feeds of a source have one format.

    `identity` changes with the content: it holds a hash of the file's bytes, or the commit of the dataset. A streamed
    file may be too large to be read twice: its path, size and modification time are used instead of its bytes.
    """

    source: str  # Source.path
    name: str  # of the file or dataset, in messages
    format: str  # Source.format
    identity: str
    raw_rows: Callable[[], Iterator[RawRow | RowFault]]  # each call starts at the first row
    version: str = ""  # of a file: differs when it was written or replaced meanwhile, whatever its bytes are


class ReadingProgress:
    """How far the reading of sources has come, in words, for another thread to show. In few different words: each is a
    line of a log."""

    def __init__(self) -> None:
        self._rows, self._name = 0, ""

    def __call__(self) -> str:
        unit = 10 ** (len(str(self._rows)) - 1)
        return f"over {self._rows // unit * unit:,} rows of {self._name}" if self._rows else ""

    def watched(self, feed: Feed) -> Feed:
        return replace(feed, raw_rows=partial(self._counted, feed))

    def _counted(self, feed: Feed) -> Iterator[RawRow | RowFault]:
        for number, raw in enumerate(feed.raw_rows()):
            self._rows, self._name = number, feed.name
            yield raw


def shown_value(value: Any) -> str:
    """A value as JSON for a message: at most 80 characters, one line, ASCII only (no control codes for the terminal).

    Values that JSON cannot hold (dates, bytes, decimals) are shown as the name of their type.
    """
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):  # ValueError: an integer with more digits than Python prints
        return f"a value of type {type(value).__name__}"
    return shortened(text, 80) if len(text) <= 80 else shortened(text, 77) + "..."


def shown_under(key: str, fields: dict[str, Any]) -> str:
    """The value of a key, for a message; if the key is missing, the keys that are there."""
    if key in fields:
        return shown_value(fields[key])
    return (
        f'no "{key}"; the keys are {shown_value(", ".join(map(str, fields)))}' if fields else f'no "{key}"; it is empty'
    )


def near_name(word: str, names: Iterable[str]) -> str:
    """The question whether the nearest of these names is meant; "" if none is near."""
    likely = get_close_matches(word, list(names), n=1)
    return f"did you mean {shown_value(likely[0])}? " if likely else ""


def missing_column(where: str, rule: str, theirs: str, fields: dict[str, Any], remedy: str = CORRECT_ENTRY) -> RowFault:
    """The fault of a row, or of all, that lacks a column which the recipe names."""
    remedy = near_name(theirs, map(str, fields)).replace("did", "Did", 1) + remedy
    return RowFault("missing_column", where=where, rule=rule, found=shown_under(theirs, fields), remedy=remedy)
