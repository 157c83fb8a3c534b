"""What a row of data is, whatever format it came in: a conversation or a text. Nothing downstream knows a format.

`answer` is where the completion begins, in rows that say so (prompt-completion, alpaca): an index into the messages, or
a character of the text. None in rows that do not: plain chats and plain text.
"""

import copyreg
import json
from dataclasses import dataclass
from typing import Any

from launcher.errors import DataError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    role: str  # one of ROLES
    content: str


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    where: str  # as errors name it: "file:line", or "file row 7"
    answer: int | None = None


@dataclass(frozen=True)
class Text:
    text: str
    where: str
    answer: int | None = None


Row = Conversation | Text


SKIP = "Fix the row, or set data.bad_rows=skip to drop such rows and count them."


class RowFault(DataError):
    """One row that cannot be used. `reason` names the count `rows_dropped_<reason>` when data.bad_rows=skip."""

    def __init__(self, reason: str, *, where: str, rule: str, found: str, remedy: str = SKIP) -> None:
        super().__init__(f"{where}: {rule}\nFound: {found}\n{remedy}")
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickled without __init__, which does not take the stored `args`: worker processes return such faults."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


def shown(value: Any) -> str:
    """A value of the data as JSON for a message: short, on one line, in ASCII (a terminal must not obey it).

    What JSON does not know (the dates, bytes and decimals of typed tables) goes by the name of its type.
    """
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):  # ValueError: an integer of more digits than Python writes out
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def shown_under(key: str, fields: dict[str, Any]) -> str:
    """What an object has under a key, for a message; where it lacks the key, those that it has."""
    if key in fields:
        return shown(fields[key])
    return f'no "{key}"; the keys are {shown(", ".join(map(str, fields)))}' if fields else f'no "{key}"; it is empty'
