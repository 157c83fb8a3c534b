"""Chats become text, with the characters that the loss sees.

A chat is rendered by the tokenizer's own template, or as skeletons.py has seen it render such chats. An assistant
turn's span is what the model would have to write: it begins where the generation prompt ends, and ends with the first
control token behind it, the turn's end token.

    prefix = render(messages[:i], generation prompt)     <bos>[user]Hi[end][assistant]
    full   = render(messages)                            <bos>[user]Hi[end][assistant]Hello.[end]\\n[user]Bye[end]\\n
    span   = what full goes on with, up to a control token                        Hello.[end]

So an empty thinking block that a template writes into the turn is supervised, and a newline behind the end token is
not. That earlier turns are written in another way than last ones (without their thinking) does no harm: they are read
from `full`. Where no control token ends the turns of a template, render(messages[: i + 1]) tells how far one reaches.
Where the generation prompt ends in an opening ("<think>\\n") that the turn lacks in `full`, the span begins before it.
A probe of plain words tells once which of this a template does. A template for which nothing of it holds cannot be
masked: an error.

A chat whose messages spell out a control token ("<|eot|>") must not end its own turn. Such strings are rendered as
stand-ins, private-use characters of the same length, and tokenised as plain characters afterwards; only these rows pay
for it.

A template that asks for today's date gets a fixed one (DATE): the same rows are the same tokens on any day.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import cast

from transformers import PreTrainedTokenizerBase

from launcher.data.chat.named_templates import without_today
from launcher.data.chat.skeletons import Skeletons
from launcher.data.read.rows import Conversation, RowFault

Chat = list[dict[str, str]]
Span = tuple[int, int]  # half-open range of characters

_PROBE = ("what is a river", "a stream of water", "thank you")

_STAND_IN = re.compile("[\U00100000-\U0010fffd]")  # Unicode's last private-use plane


@dataclass(frozen=True)
class Rendered:
    """A row as text. `spans`: the characters that the loss sees, None: all. `literals`: what stand-ins hide."""

    text: str
    spans: Sequence[Span] | None
    literals: dict[str, str]
    framed: bool = False  # gets a begin and an end token when tokenised

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """The text as it reads without stand-ins, cut where they stood: (piece, whether it is one of `literals`)."""
        at = 0
        for match in _STAND_IN.finditer(self.text) if self.literals else ():
            if match.start() >= at:  # a stand-in is as many equal characters as its literal is long
                if match.start() > at:
                    yield self.text[at : match.start()], False
                literal = self.literals[match[0]]
                yield literal, True
                at = match.start() + len(literal)
        if self.text[at:]:
            yield self.text[at:], False


@dataclass(frozen=True)
class _Veiled:
    """A conversation as the template gets it, and the messages of it to supervise; None: all of the text."""

    row: Conversation
    chat: Chat
    literals: dict[str, str]
    turns: list[int] | None


@dataclass(frozen=True)
class _Habits:
    """How a template writes a turn that others follow. `ends_turns`: a control token stands behind it, the same as
    behind a last one. `opening`: what the generation prompt ends in, and such a turn does not begin with.
    """

    ends_turns: bool = False
    opening: str = ""


class Renderer:
    """Renders chats with the tokenizer's template. `name`: what errors call that template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name
        control = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        # Two patterns: alternatives that begin alike are found a hundred times faster than mixed ones.
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        self._hidden = re.compile(f"{self._control.pattern}|{_STAND_IN.pattern}")

    def render(self, rows: Sequence[Conversation], losses: Sequence[str]) -> list[Rendered | RowFault]:
        """Each row under its loss (assistant, completion or all); a fault stands for one that the template refuses, or
        in which it does not tell the assistant's part.
        """
        chats = [self._veil(row, loss) for row, loss in zip(rows, losses, strict=True)]
        fulls = self._apply([chat.chat for chat in chats], prompt=False)
        prompts = [chat.chat[:turn] for chat in chats for turn in chat.turns or ()]
        prefixes = iter(self._apply(prompts, prompt=True))
        rendered: list[Rendered | RowFault] = []
        for chat, full in zip(chats, fulls, strict=True):
            own = [next(prefixes) for _ in chat.turns or ()]
            refused = next((text for text in (full, *own) if isinstance(text, Exception)), None)
            if refused:
                rendered.append(self._fault(chat.row, refused))
                continue
            full = cast(str, full)
            try:
                rendered.append(Rendered(full, self._spans(chat, cast(list[str], own), full), chat.literals))
            except RowFault as unmaskable:
                rendered.append(unmaskable)
        return rendered

    def prompt(self, row: Conversation) -> Rendered:
        """The conversation with the generation prompt behind it. Raises RowFault if the template refuses it."""
        veiled = self._veil(row, "all")
        [text] = self._apply([veiled.chat], prompt=True)
        if isinstance(text, Exception):
            raise self._fault(row, text) from text
        return Rendered(text, None, veiled.literals)

    def _veil(self, row: Conversation, loss: str) -> _Veiled:
        """Control-token strings in messages become stand-ins of their length; so does what looks like a stand-in."""
        chat = [{"role": message.role, "content": message.content} for message in row.messages]
        turns = None if loss == "all" else _turns(row, loss)
        if not any(self._control.search(message.content) for message in row.messages):
            return _Veiled(row, chat, {}, turns)
        found = sorted({literal for message in row.messages for literal in self._hidden.findall(message.content)})
        stand_in = {literal: chr(0x100000 + index) for index, literal in enumerate(found)}
        for turn in chat:
            turn["content"] = self._hidden.sub(lambda match: stand_in[match[0]] * len(match[0]), turn["content"])
        return _Veiled(row, chat, {char: literal for literal, char in stand_in.items()}, turns)

    def _apply(self, chats: list[Chat], *, prompt: bool) -> list[str | Exception]:
        """A text for each, or what the template raised."""
        texts: list[str | Exception | None] = [self._skeletons.text(chat, prompt=prompt) for chat in chats]
        unknown = [index for index, text in enumerate(texts) if text is None]
        for index, text in zip(unknown, self._run([chats[index] for index in unknown], prompt=prompt), strict=True):
            texts[index] = text
            if isinstance(text, str):
                self._skeletons.learn(chats[index], text, prompt=prompt)
        return cast(list[str | Exception], texts)

    def _run(self, chats: list[Chat], *, prompt: bool) -> list[str | Exception]:
        """The template on each. In one call: a call for each would take half as long again."""
        if not chats:
            return []
        apply = self._tokenizer.apply_chat_template
        try:
            texts = apply(chats, chat_template=self._template, tokenize=False, add_generation_prompt=prompt)
            return cast(list[str | Exception], texts)
        except Exception as error:  # a template is a program of its own: whatever it raises is about a chat
            if len(chats) == 1:
                return [error]
            half = len(chats) // 2
            return self._run(chats[:half], prompt=prompt) + self._run(chats[half:], prompt=prompt)

    @cached_property
    def _skeletons(self) -> Skeletons:
        return Skeletons(self._template, self._tokenizer.special_tokens_map)

    @cached_property
    def _template(self) -> str:
        return without_today(self._tokenizer.get_chat_template())

    @cached_property
    def _habits(self) -> _Habits:
        """A template that refuses the probe has none."""
        roles = ("user", "assistant", "user")
        chat = [{"role": role, "content": words} for role, words in zip(roles, _PROBE, strict=True)]
        texts = self._run([chat[:1], chat[:2], chat], prompt=False) + self._run([chat[:1]], prompt=True)
        if any(isinstance(text, Exception) for text in texts):
            return _Habits()
        asked, answered, followed, prefix = cast(list[str], texts)
        ending = self._ending(followed)
        shared = commonprefix([prefix, followed])
        opening = prefix[len(shared) :] if shared.startswith(asked) else ""
        return _Habits(ends_turns=bool(ending) and ending == self._ending(answered), opening=opening)

    def _ending(self, text: str) -> str:
        """What stands behind the probe's answer, up to and with a control token; "" if either is missing."""
        _, answer, behind = text.rpartition(_PROBE[1])
        token = self._control.search(behind) if answer else None
        return behind[: token.end()] if token else ""

    def _spans(self, veiled: _Veiled, prefixes: list[str], full: str) -> list[Span] | None:
        if veiled.turns is None:
            return None
        turns = zip(veiled.turns, prefixes, strict=True)
        spans = [self._span(veiled, turn, prefix, full) for turn, prefix in turns]
        return [(start, end) for start, end in spans if start < end]

    def _span(self, veiled: _Veiled, turn: int, prefix: str, full: str) -> Span:
        if not full.startswith(prefix):
            prefix = prefix.removesuffix(self._habits.opening)
        end = self._end(veiled.chat, turn, len(prefix), full) if full.startswith(prefix) else None
        if end is not None:
            return len(prefix), end
        raise RowFault(
            "unmaskable",
            where=veiled.row.where,
            rule="to mask all but the assistant, a chat template must write what comes before a turn the same whatever "
            "follows, and end the turn.",
            found=f"{self._name} does not, message {turn + 1}. data.loss_on=all needs none; data.template has others.",
        )

    def _end(self, chat: Chat, turn: int, start: int, full: str) -> int | None:
        """Where the turn ends: where it starts if the template leaves nothing of it, None if that cannot be told."""
        token = self._control.search(full, start) if self._habits.ends_turns else None
        if token and _is_turn(chat, turn, full[start : token.start()], full, token.end()):
            return token.end()
        if token and not full[start : token.start()].strip() and self._empties(chat, turn, full):
            return start
        [upto] = [full] if turn + 1 == len(chat) else self._apply([chat[: turn + 1]], prompt=False)
        if not isinstance(upto, str) or not full.startswith(upto):
            return None
        token = self._control.search(full, start, len(upto))
        if token and _is_turn(chat, turn, full[start : token.start()], full, token.end()):
            return token.end()
        return len(upto) if _is_turn(chat, turn, full[start : len(upto)], full, len(upto)) else None

    def _empties(self, chat: Chat, turn: int, full: str) -> bool:
        """Whether the template writes this turn, of thoughts alone perhaps, as if it said nothing."""
        silent = [*chat[:turn], {**chat[turn], "content": ""}, *chat[turn + 1 :]]
        return self._apply([silent], prompt=False) == [full]

    def _fault(self, row: Conversation, error: Exception) -> RowFault:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        rule = f"the chat template ({self._name}) must accept the conversation."
        return RowFault("template", where=row.where, rule=rule, found=found)


def _turns(row: Conversation, loss: str) -> list[int]:
    """The assistant's messages to supervise; those that say nothing train nothing."""
    turns = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
    if loss == "completion":
        turns = turns[-1:] if row.answer is None else [turn for turn in turns if turn >= row.answer]
    return [turn for turn in turns if row.messages[turn].content.strip()]


def _is_turn(chat: Chat, turn: int, said: str, full: str, end: int) -> bool:
    """Whether `said` is what this message became, and what follows it stands behind `end`. Templates may drop the
    thinking that a content begins with, and set whitespace as they like.
    """
    following = chat[turn + 1] if turn + 1 < len(chat) else None
    if following and following["role"] == "user" and full.find(following["content"].strip(), end) < 0:
        return False
    if chat[turn]["content"].strip() in said:
        return True
    said, meant = ("".join(text.split()) for text in (said, chat[turn]["content"]))
    return meant in said or (bool(said) and meant.endswith(said))
