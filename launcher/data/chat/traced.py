"""Text that keeps account of what a template does with it, so that what is written is known for other texts too.

    content                Traced: the message's text
    content | trim         Traced: the same, stripped
    "<|user|>" + that      Traced: "<|user|>", then the message's text, stripped

Where a template decides by the text (`if content`, `"</think>" in content`), a traced one answers for the text that it
stands for and notes question and answer: any text that gives the same answers is written the same way. What cannot be
noted (its length, its characters, text that it is formatted into) is refused. Never a guess: whatever has no method
here raises Untold, and says so in its notes as well, since a filter might swallow the exception.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller
from typing import Any, NoReturn


class Untold(Exception):
    """What a template asks of a text cannot be noted."""


@dataclass(frozen=True)
class Part:
    """The content of a message, after some steps from text to text."""

    message: int
    steps: tuple[Callable[[str], str], ...] = ()

    def of(self, contents: Sequence[str]) -> str:
        text = contents[self.message]
        for step in self.steps:
            text = step(text)
        return text


@dataclass
class Notes:
    """`contents`: the texts that the traced ones of one run stand for. `untold`: something could not be noted."""

    contents: Sequence[str]
    questions: list[tuple[Part, Callable[[str], Any], Any]] = field(default_factory=list)  # and the answer
    untold: bool = False


def _step(name: str) -> Callable[..., "Traced"]:
    return lambda text, *args: text._after(methodcaller(name, *args), args)


def _question(name: str) -> Callable[..., Any]:
    return lambda text, *args: text._answer(methodcaller(name, *args), args)


def _refused(text: "Traced", *_: object) -> NoReturn:
    text._notes.untold = True
    raise Untold


class Traced:
    """Stands for a text in a template; no `str`, so that nothing takes its characters unseen."""

    __slots__ = ("_notes", "_parts")

    def __init__(self, notes: Notes, parts: tuple[str | Part, ...]) -> None:
        self._notes, self._parts = notes, parts

    strip, lstrip, rstrip = _step("strip"), _step("lstrip"), _step("rstrip")
    removeprefix, removesuffix, replace = _step("removeprefix"), _step("removesuffix"), _step("replace")
    startswith, endswith = _question("startswith"), _question("endswith")
    __contains__ = _question("__contains__")

    def __bool__(self) -> bool:
        return any(part for part in self._parts if isinstance(part, str)) or bool(self._answer(bool, ()))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Traced) and other._parts == self._parts:
            return True
        if not isinstance(other, str | Traced):  # a text equals nothing else, whatever it says
            return False
        return bool(self._answer(methodcaller("__eq__", other), (other,)))

    def __add__(self, other: "str | Traced") -> "Traced":
        return joined([self, other]) if isinstance(other, str | Traced) else NotImplemented

    def __radd__(self, other: str) -> "Traced":
        return joined([other, self]) if isinstance(other, str) else NotImplemented

    def split(self, *args: Any) -> "list[Traced]":
        if len(args) != 1 or not args[0]:
            _refused(self)
        count = self._answer(methodcaller("count", *args), args) + 1
        return [self._after(partial(_piece, args[0], index), args) for index in range(count)]

    __str__ = __repr__ = __format__ = __hash__ = __len__ = __iter__ = __getitem__ = __getattr__ = _refused
    __lt__ = __le__ = __gt__ = __ge__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __reversed__ = _refused

    def _after(self, step: Callable[[str], str], args: Sequence[object]) -> "Traced":
        part = self._one_part(args)
        return Traced(self._notes, (Part(part.message, (*part.steps, step)),))

    def _answer(self, question: Callable[[str], Any], args: Sequence[object]) -> Any:
        part = self._one_part(args)
        answer = question(part.of(self._notes.contents))
        self._notes.questions.append((part, question, answer))
        return answer

    def _one_part(self, args: Sequence[object]) -> Part:
        """Steps and questions are noted of one message's text, and with arguments that are the same for every text."""
        [part, *more] = self._parts
        if more or isinstance(part, str) or not all(arg is None or isinstance(arg, str) for arg in args):
            _refused(self)
        return part


def _piece(separator: str, index: int, text: str) -> str:
    """ "" where there is no such piece: then the question how many there are has another answer."""
    pieces = text.split(separator)
    return pieces[index] if index < len(pieces) else ""


def joined(values: Iterable[object]) -> Any:
    """What a template writes, one after another: a str if nothing in it is traced."""
    listed = list(values)
    traced = next((value for value in listed if isinstance(value, Traced)), None)
    if traced is None:
        return "".join(map(str, listed))
    parts: list[str | Part] = []
    for value in listed:
        parts.extend(value._parts if isinstance(value, Traced) else (str(value),))
    return Traced(traced._notes, tuple(parts))
