"""What a chat template writes, learned from one chat and filled in for the others of its shape.

A shape is the roles of the messages, and whether the generation prompt follows. The template runs once on traced texts
(traced.py), which gives a skeleton: literal text with places for contents, and the questions about the contents that
must have the same answers. Filling one takes a sixteenth of running a short template (2 against 31 µs).

    roles user, assistant        "<s>[user]", content 0 stripped, "[end][assistant]", content 1, "[end]"
    answers                      "</think>" in content 1: no

A skeleton is exact, and nothing rests on that the environment here is the one of transformers: what it makes of the
chat that it was learned from must be what transformers wrote. If not, none is used. A template that asks what cannot
be noted has no skeleton for that shape, and runs for every chat.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.nativetypes import NativeCodeGenerator
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS

from launcher.data.chat.traced import Notes, Part, Traced, Untold, joined

Shape = tuple[bool, tuple[str, ...]]  # with the generation prompt; roles

MOST = 1024  # skeletons of a template; a long chat has one for each of its turns
MOST_TRIED = 4  # chats of a shape that a skeleton is learned from, as their answers differ

_FILTERS = "capitalize count d default first items join last length list lower map reject rejectattr replace reverse"
_KEPT = (*_FILTERS.split(), "select", "selectattr", "string", "trim", "upper")  # they take a traced text, or refuse it


class Skeleton:
    """`parts`: what is written, of literal text and contents. `questions`: those with the answers that it holds for."""

    def __init__(
        self, parts: Sequence[str | Part], questions: Sequence[tuple[Part, Callable[[str], Any], Any]]
    ) -> None:
        self._frame = "".join([part.replace("%", "%%") if isinstance(part, str) else "%s" for part in parts])
        self._places = [part for part in parts if isinstance(part, Part)]
        self._questions = questions

    def text(self, contents: Sequence[str]) -> str | None:
        """None for contents that give other answers."""
        for part, question, answer in self._questions:
            if question(part.of(contents)) != answer:
                return None
        return self._frame % tuple([part.of(contents) for part in self._places])


class Skeletons:
    """Those of one template. `variables` are what it sees beside the messages."""

    def __init__(self, template: str, variables: Mapping[str, object]) -> None:
        self._known: defaultdict[Shape, list[Skeleton]] = defaultdict(list)
        self._tried: Counter[Shape] = Counter()
        self._variables = variables
        self._template: Template | None = None
        try:
            environment = _environment()
            if (
                environment.parse(template).find(nodes.EvalContextModifier) is None
            ):  # autoescape changes what is written
                self._template = environment.from_string(template)
        except Exception:  # a tag that is not known here, or a template that is none: transformers will say
            return

    def text(self, chat: Sequence[Mapping[str, str]], *, prompt: bool) -> str | None:
        """What the template writes; None where that is not known."""
        contents = [message["content"] for message in chat]
        for skeleton in self._known.get(_shape(chat, prompt=prompt), ()):
            text = skeleton.text(contents)
            if text is not None:
                return text
        return None

    def learn(self, chat: Sequence[Mapping[str, str]], text: str, *, prompt: bool) -> None:
        """From a chat and what transformers makes of it."""
        shape = _shape(chat, prompt=prompt)
        done = self._tried[shape] == MOST_TRIED or self._tried.total() == MOST
        if self._template is None:
            return
        known = self.text(chat, prompt=prompt)
        if known is not None and known != text:
            self._forget()
        if done or known is not None:
            return
        self._tried[shape] += 1
        skeleton = self._traced(chat, prompt=prompt)
        if skeleton is None:
            return
        if skeleton.text([message["content"] for message in chat]) == text:
            self._known[shape].append(skeleton)
        else:
            self._forget()

    def _forget(self) -> None:
        """What was wrong once is not asked again: transformers renders every chat of this template."""
        self._template = None
        self._known.clear()

    def _traced(self, chat: Sequence[Mapping[str, str]], *, prompt: bool) -> Skeleton | None:
        assert self._template is not None
        notes = Notes([message["content"] for message in chat])
        messages = [
            {"role": message["role"], "content": Traced(notes, (Part(index),))} for index, message in enumerate(chat)
        ]
        seen = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": prompt}
        try:
            written: str | Traced = self._template.render(**seen, **self._variables)
        except Exception:  # whatever a template raises where it is given what is no text
            return None
        if notes.untold:
            return None
        return Skeleton(written._parts if isinstance(written, Traced) else (written,), tuple(notes.questions))


def _shape(chat: Sequence[Mapping[str, str]], *, prompt: bool) -> Shape:
    return prompt, tuple([message["role"] for message in chat])


class _Generation(Extension):
    """The tag that marks what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], Any]) -> Any:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    """As transformers documents the one that it renders with, but what is written is not made a str."""

    code_generator_class = NativeCodeGenerator
    concat = staticmethod(joined)

    def getitem(self, obj: Any, argument: Any) -> Any:
        # jinja would take an error of the lookup for a missing key: a content as a key must not pass unnoticed.
        return super().getitem(obj, str(argument) if isinstance(argument, Traced) else argument)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters = {name: FILTERS[name] if name in _KEPT else _refuse for name in (*FILTERS, "tojson")}
    environment.filters |= {"trim": _trim, "string": _string}
    environment.tests = TESTS | {"string": _is_string, "sameas": _refuse}
    environment.globals |= dict.fromkeys(("lipsum", "strftime_now", "raise_exception"), _refuse)
    return environment


def _refuse(*_: object, **__: object) -> NoReturn:
    raise Untold


def _trim(value: Any, chars: str | None = None) -> Any:
    return value.strip(chars) if isinstance(value, Traced) else FILTERS["trim"](value, chars)


def _string(value: Any) -> Any:
    return value if isinstance(value, Traced) else FILTERS["string"](value)


def _is_string(value: object) -> bool:
    return isinstance(value, str | Traced)
