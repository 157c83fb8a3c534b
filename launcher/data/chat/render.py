"""Rows become text, with the spans of characters that the loss sees.

A chat is rendered by the tokenizer's own template. An assistant turn's span is what the model would have to write: it
begins where the generation prompt ends, and ends with the first control token after that, the turn's end token.

    prompt = render(messages[:i], generation prompt)     <bos>[user]Hi[end][assistant]
    text   = render(messages)                            <bos>[user]Hi[end][assistant]Hello.[end]\\n[user]Bye[end]\\n
    span   = what follows the prompt in text, up to and with a control token      Hello.[end]

So an empty thinking block that a template writes into the turn is supervised, and a newline after the end token is
not. A template may write earlier turns in another way than the last one (without their thinking): spans lie in `text`,
so this does no harm. Where no control token ends a template's turns, render(messages[: i + 1]) shows where a turn ends.
Where the generation prompt ends in an opening ("<think>\\n") that the turn in `text` lacks, the span begins before the
opening. Rendering a short sample chat shows once which of these a template does. A template that fits none of them
cannot be masked: a RowFault.

A message may spell out a control token ("<|eot|>"), which must not end its turn. Such strings are rendered as
stand-ins, private-use characters of the same number, and tokenised as plain characters afterwards. Only rows with such
strings pay for it.

A template that asks for today's date gets a fixed one: the same rows give the same tokens on any day.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix

from transformers import PreTrainedTokenizerBase

from launcher.data.chat.named_templates import control_tokens, without_today
from launcher.data.read.rows import Conversation, RowFault, Text

Messages = list[dict[str, str]]  # as templates take them
Span = tuple[int, int]  # half-open range of characters

SAMPLE = ("what is a river", "a stream of water", "thank you")  # user, assistant, user
STAND_IN = re.compile("[\U00100000-\U0010fffd]")  # Unicode's last private-use plane


@dataclass(frozen=True)
class Rendered:
    """A row as text. `spans`: the characters that the loss sees; None: all. `stand_ins`: the string that each replaces.
    `framed`: the text gets a begin and an end token when tokenised.
    """

    text: str
    spans: Sequence[Span] | None
    stand_ins: dict[str, str]
    framed: bool = False

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """The original text, cut at the strings that stand-ins replaced: (piece, whether it is such a string)."""
        start = 0
        for match in STAND_IN.finditer(self.text) if self.stand_ins else ():
            if match.start() < start:  # a string of n characters has n equal stand-ins
                continue
            if match.start() > start:
                yield self.text[start : match.start()], False
            replaced = self.stand_ins[match[0]]
            yield replaced, True
            start = match.start() + len(replaced)
        if self.text[start:]:
            yield self.text[start:], False


@dataclass(frozen=True)
class TurnFormat:
    """How a template writes an assistant turn that another message follows.

    `ends_turns`: a control token ends it, the same one as at the end of the chat. `opening`: what the generation prompt
    ends in and the turn does not begin with.
    """

    ends_turns: bool = False
    opening: str = ""


class ChatRenderer:
    """Renders chats with the tokenizer's template. `name`: what errors call that template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name
        # Two patterns: alternatives that begin with the same characters are found a hundred times faster than mixed.
        self._control = re.compile("|".join(map(re.escape, control_tokens(tokenizer).values())) or "(?!)")
        self._to_replace = re.compile(f"{self._control.pattern}|{STAND_IN.pattern}")

    def render(self, row: Conversation, loss_on: str) -> Rendered:
        """The chat with the spans that the loss sees: assistant turns, the completion's turns, or None for "all".

        Raises RowFault: the template refuses the chat, or does not show where an assistant turn begins and ends.
        """
        messages, stand_ins = self._with_stand_ins(row)
        with self._refusals(row):
            text = self._apply(messages)
            if loss_on == "all":
                return Rendered(text, None, stand_ins)
            turns = _supervised_turns(row, loss_on)
            prompts = [self._apply(messages[:turn], prompt=True) for turn in turns]
        spans = [self._span(messages, turn, prompt, text) for turn, prompt in zip(turns, prompts, strict=True)]
        if None in spans:
            raise self._unmaskable(row, turns[spans.index(None)])
        return Rendered(text, [span for span in spans if span], stand_ins)

    def render_prompt(self, row: Conversation) -> Rendered:
        """The chat, then the generation prompt. Raises RowFault if the template refuses it."""
        messages, stand_ins = self._with_stand_ins(row)
        with self._refusals(row):
            return Rendered(self._apply(messages, prompt=True), None, stand_ins)

    def _with_stand_ins(self, row: Conversation) -> tuple[Messages, dict[str, str]]:
        """The messages with stand-ins for control tokens that they spell out; and then for stand-ins they contain."""
        messages = [{"role": message.role, "content": message.content} for message in row.messages]
        if not any(self._control.search(message["content"]) for message in messages):
            return messages, {}
        strings = sorted({string for message in messages for string in self._to_replace.findall(message["content"])})
        stand_in = {string: chr(0x100000 + index) for index, string in enumerate(strings)}
        for message in messages:
            message["content"] = self._to_replace.sub(lambda m: stand_in[m[0]] * len(m[0]), message["content"])
        return messages, {char: string for string, char in stand_in.items()}

    def _apply(self, messages: Messages, *, prompt: bool = False) -> str:
        apply = self._tokenizer.apply_chat_template
        return str(apply(messages, chat_template=self._template, tokenize=False, add_generation_prompt=prompt))

    def _apply_or_none(self, messages: Messages) -> str | None:
        try:
            return self._apply(messages)
        except Exception:
            return None

    @cached_property
    def _template(self) -> str:
        return without_today(self._tokenizer.get_chat_template())

    @cached_property
    def _turn_format(self) -> TurnFormat:
        """Found on a sample chat; the default for a template that refuses it."""
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": content} for role, content in zip(roles, SAMPLE, strict=True)]
        try:
            question, answered, followed = (self._apply(messages[:end]) for end in (1, 2, 3))
            prompt = self._apply(messages[:1], prompt=True)
        except Exception:
            return TurnFormat()
        ending = self._ending(followed)
        shared = commonprefix([prompt, followed])
        opening = prompt[len(shared) :] if shared.startswith(question) else ""
        return TurnFormat(ends_turns=bool(ending) and ending == self._ending(answered), opening=opening)

    def _ending(self, text: str) -> str:
        """What follows the sample's answer, up to and with a control token; "" if either is missing."""
        _, answer, rest = text.rpartition(SAMPLE[1])
        token = self._control.search(rest) if answer else None
        return rest[: token.end()] if token else ""

    def _span(self, messages: Messages, turn: int, prompt: str, text: str) -> Span | None:
        """The turn's characters in `text`; None if the template does not show them."""
        if not text.startswith(prompt):
            prompt = prompt.removesuffix(self._turn_format.opening)
        end = self._turn_end(messages, turn, len(prompt), text) if text.startswith(prompt) else None
        return None if end is None else (len(prompt), end)

    def _turn_end(self, messages: Messages, turn: int, start: int, text: str) -> int | None:
        """Where the turn from `start` on ends: at `start` if the template writes nothing of it, None if unknown."""
        token = self._control.search(text, start) if self._turn_format.ends_turns else None
        if token and _is_turn(messages, turn, text, (start, token.start()), token.end()):
            return token.end()
        if token and not text[start : token.start()].strip() and self._is_written_as_empty(messages, turn, text):
            return start
        so_far = text if turn + 1 == len(messages) else self._apply_or_none(messages[: turn + 1])
        if so_far is None or not text.startswith(so_far):
            return None
        end = len(so_far)
        token = self._control.search(text, start, end)
        if token and _is_turn(messages, turn, text, (start, token.start()), token.end()):
            return token.end()
        return end if _is_turn(messages, turn, text, (start, end), end) else None

    def _is_written_as_empty(self, messages: Messages, turn: int, text: str) -> bool:
        """Whether the template writes this turn (of thoughts alone, perhaps) as it would one without content."""
        emptied = [*messages[:turn], {**messages[turn], "content": ""}, *messages[turn + 1 :]]
        return self._apply_or_none(emptied) == text

    @contextmanager
    def _refusals(self, row: Conversation) -> Iterator[None]:
        """A template is a program of its own: whatever it raises is a fault of this chat."""
        try:
            yield
        except Exception as error:
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            rule = f"the chat template ({self._name}) must accept the conversation."
            raise RowFault("template", where=row.where, rule=rule, found=found) from error

    def _unmaskable(self, row: Conversation, turn: int) -> RowFault:
        rule = (
            "to mask all but the assistant, a chat template must write what comes before a turn the same whatever "
            "follows, and end the turn."
        )
        found = f"{self._name} does not, message {turn + 1}. data.loss_on=all needs none; data.template has others."
        return RowFault("unmaskable", where=row.where, rule=rule, found=found)


def render_text(row: Text, loss_on: str) -> Rendered:
    """Plain text, framed. A blank completion is not supervised, like a blank assistant turn."""
    if loss_on == "all":
        return Rendered(row.text, None, {}, framed=True)
    start = row.answer or 0
    spans = [(start, len(row.text))] if row.text[start:].strip() else []
    return Rendered(row.text, spans, {}, framed=True)


def _supervised_turns(row: Conversation, loss_on: str) -> list[int]:
    """The assistant's messages to supervise: all, or those of the completion. Blank ones train nothing."""
    turns = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
    if loss_on == "completion":
        turns = turns[-1:] if row.answer is None else [turn for turn in turns if turn >= row.answer]
    return [turn for turn in turns if row.messages[turn].content.strip()]


def _is_turn(messages: Messages, turn: int, text: str, span: Span, end: int) -> bool:
    """Whether `span` of the text holds what this message became, and the next user message comes after `end`.

    Templates may drop the thinking that a content begins with, and set whitespace as they like.
    """
    content, written = messages[turn]["content"], text[slice(*span)]
    following = messages[turn + 1] if turn + 1 < len(messages) else None
    if following and following["role"] == "user" and text.find(following["content"].strip(), end) < 0:
        return False
    if content.strip() in written:
        return True
    written, content = ("".join(string.split()) for string in (written, content))
    return content in written or (bool(written) and content.endswith(written))
