"""Chats become text, with the characters that the loss sees.

A chat is rendered by the tokenizer's own template. An assistant turn's span is what the model would have to write: it
begins where the generation prompt ends, and ends with the first control token behind it, the turn's end token.

    prefix = render(messages[:i], generation prompt)     <bos>[user]Hi[end][assistant]
    full   = render(messages)                            <bos>[user]Hi[end][assistant]Hello.[end]\\n[user]Bye[end]\\n
    span   = what full goes on with, up to a control token                        Hello.[end]

So an empty thinking block that a template writes into the turn is supervised, and a newline behind the end token is
not. That earlier turns are written in another way than last ones (without their thinking) does no harm: they are read
from `full`. Where no control token ends the turn, render(messages[: i + 1]) tells how far it reaches. A template for
which neither holds cannot be masked: an error.

A chat whose messages spell out a control token ("<|eot|>") must not end its own turn. Such strings are rendered as
stand-ins, private-use characters of the same length, and tokenised as plain characters afterwards; only these rows pay
for it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase

from launcher.data.rows import Conversation, RowFault

Chat = list[dict[str, str]]
Span = tuple[int, int]  # half-open range of characters

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
        """A text for each, or what the template raised. In one call: a call for each would take half as long again."""
        if not chats:
            return []
        apply = self._tokenizer.apply_chat_template
        try:
            return cast(list[str | Exception], apply(chats, tokenize=False, add_generation_prompt=prompt))
        except Exception as error:  # a template is a program of its own: whatever it raises is about a chat
            if len(chats) == 1:
                return [error]
            half = len(chats) // 2
            return self._apply(chats[:half], prompt=prompt) + self._apply(chats[half:], prompt=prompt)

    def _spans(self, veiled: _Veiled, prefixes: list[str], full: str) -> list[Span] | None:
        if veiled.turns is None:
            return None
        return [self._span(veiled, turn, prefix, full) for turn, prefix in zip(veiled.turns, prefixes, strict=True)]

    def _span(self, veiled: _Veiled, turn: int, prefix: str, full: str) -> Span:
        start = len(prefix)
        if full.startswith(prefix):
            end_token = self._control.search(full, start)
            if end_token and _is_turn(veiled.chat, turn, full[start : end_token.start()], full[end_token.end() :]):
                return start, end_token.end()
            [upto] = self._apply([veiled.chat[: turn + 1]], prompt=False)
            if isinstance(upto, str) and full.startswith(upto):
                end = len(upto)
                if _is_turn(veiled.chat, turn, full[start:end], full[end:]):
                    return start, end
        raise RowFault(
            "unmaskable",
            where=veiled.row.where,
            rule="to mask all but the assistant, a chat template must write what comes before a turn the same whatever "
            "follows, and end the turn.",
            found=f"{self._name} does not, message {turn + 1}. data.loss_on=all needs none; data.template has others.",
        )

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


def _is_turn(chat: Chat, turn: int, said: str, rest: str) -> bool:
    """Whether `said` is what this message became, and `rest` what follows it. Templates may drop the thinking that a
    content begins with, and set whitespace as they like.
    """
    said, meant = ("".join(text.split()) for text in (said, chat[turn]["content"]))
    following = chat[turn + 1] if turn + 1 < len(chat) else None
    if following and following["role"] == "user" and following["content"].strip() not in rest:
        return False
    return meant in said or (bool(said) and meant.endswith(said))
