"""Rows become text, with the spans of characters that the loss sees.

A chat is rendered by the tokenizer's own template. Where the template marks the assistant's text with
`{% generation %}` blocks, as transformers defines them, these are the spans. Elsewhere an assistant turn's span is what
the model would have to write: turns.py finds it.

    text   <bos>[user]Hi[end][assistant]Hello.[end]\\n[user]Bye[end]\\n
    span                                Hello.[end]

A turn of thoughts alone, of which a template writes nothing but control tokens, trains nothing.

A template that asks for today's date gets a fixed one: the same rows give the same tokens on any day.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from launcher.credentials import shortened
from launcher.data.chat.ends import Ends
from launcher.data.chat.named_templates import without_today
from launcher.data.chat.spelled_out import BEGIN, END, Messages, SpelledOut, restored
from launcher.data.chat.turns import THOUGHTS_ALONE, Span, Turns, UnshownTurn
from launcher.data.read.rows import SKIP, Conversation, PlainText, RowFault
from launcher.errors import RecipeError
from launcher.records.counts import UNCLOSED

CUT = "rows_cut_by_template"
ENDLESS = "rows_without_end_token"
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True)
class Rendered:
    """A row as text. `spans`: the characters that the loss sees; None: all. `stand_ins`: the string that each
    replaces. `framed`: the text gets a begin and an end token when tokenised. `remarks`: as of Document.
    """

    text: str
    spans: Sequence[Span] | None
    stand_ins: dict[str, str]
    framed: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The text as it reads, without stand-ins."""
        return restored(self.text, self.stand_ins)


class ChatRenderer:
    """Renders chats with the tokenizer's template. `name`: what errors call that template. `stop_ids`: as of Ends."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, spelled_out: SpelledOut, name: str, stop_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._spelled_out, self._name, self._stop_ids = tokenizer, spelled_out, name, stop_ids
        # Any added token may end a turn, also one that is not special.
        self._end_tokens = tuple(token.content for token in tokenizer.added_tokens_decoder.values())

    def render(self, row: Conversation, loss_on: str) -> Rendered:
        """The chat with the spans that the loss sees: assistant turns, the completion's turns, or None for "all".

        Remarks CUT where the template leaves out text of a message, ENDLESS where no stop token ends a turn, and what
        ends each turn.
        Raises RowFault: the template refuses the chat, or does not show where an assistant turn begins and ends; and
        RecipeError: it is no valid Jinja.
        """
        messages, stand_ins = self._spelled_out.hide(row.messages)
        turns = _supervised_turns(row, loss_on)
        with self._faults(row):
            text = self._apply(messages)
            remarks: tuple[str, ...] = (CUT,) if _is_cut(messages, text) else ()
            answer_last = messages[-1]["role"] == "assistant" and bool(messages[-1]["content"].strip())
            if loss_on == "all":
                text = self._ends.close_chat(text) if answer_last else text
                return Rendered(text, None, stand_ins, remarks=remarks)
            find = self._marked_spans if self._marked_template else self._turns.spans
            spans = find(messages, turns, text)
        answer_last = answer_last and turns[-1:] == [len(messages) - 1]
        text, spans, ends = self._ends.close(text, spans, turns=len(turns), answer_last=answer_last)
        written = [text[slice(*span)] for span in spans]
        remarks += (*ends, *[ENDLESS] * (UNCLOSED in ends))
        if any(THOUGHTS_ALONE.search(messages[turn]["content"]) for turn in turns):
            spans = [
                s for s, part in zip(spans, written, strict=True) if self._spelled_out.control.sub("", part).strip()
            ]
        return Rendered(text, spans, stand_ins, remarks=remarks)

    def render_prompt(self, row: Conversation) -> Rendered:
        """The chat, then the generation prompt. Raises RowFault if the template refuses it."""
        messages, stand_ins = self._spelled_out.hide(row.messages)
        with self._faults(row):
            return Rendered(self._apply(messages, prompt=True), None, stand_ins)

    def _apply(self, messages: Messages, *, prompt: bool = False, template: str | None = None) -> str:
        apply, template = self._tokenizer.apply_chat_template, template or self._template
        return str(apply(messages, chat_template=template, tokenize=False, add_generation_prompt=prompt))

    @cached_property
    def _template(self) -> str:
        return without_today(self._tokenizer.get_chat_template())

    @cached_property
    def _turns(self) -> Turns:
        return Turns(self._apply, control=self._spelled_out.control, end_tokens=self._end_tokens)

    @cached_property
    def _ends(self) -> Ends:
        return Ends(self._tokenizer, stop_ids=self._stop_ids, last=self._turns.last_token)

    @cached_property
    def _marked_template(self) -> str:
        """The template with BEGIN and END around the text of every generation block; "" without one.

        transformers' own record of the blocks is wrong inside macros.
        """

        def marked(tag: re.Match[str]) -> str:
            left, is_end, right = tag.groups()
            if is_end:
                return f"{{%{left} endif %}}{{{{ '{END}' }}}}{{% endwith {right}%}}"
            return f"{{%{left} with %}}{{{{ '{BEGIN}' }}}}{{% if true {right}%}}"  # `with`: a scope, as the block is

        template, count = GENERATION.subn(marked, self._template)
        return template if count else ""

    def _marked_spans(self, messages: Messages, turns: Sequence[int], text: str) -> list[Span]:
        """The spans of generation blocks, without those between the begin of another assistant turn and the next."""
        pieces = re.split(f"[{BEGIN}{END}]", self._apply(messages, template=self._marked_template))
        if "".join(pieces) != text:
            raise UnshownTurn(turns[0] if turns else 0)
        borders = list(accumulate(map(len, pieces)))
        spans = list(zip(borders[::2], borders[1::2], strict=False))
        assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        groups = [(is_chosen, next(indices)) for is_chosen, indices in groupby(assistants, set(turns).__contains__)]
        begins = [0, *(self._turns.begin(messages, first, text) for _, first in groups[1:]), len(text)]
        chosen = [part for (is_chosen, _), part in zip(groups, pairwise(begins), strict=False) if is_chosen]
        return [span for span in spans if any(begin < span[1] <= end for begin, end in chosen)]

    @contextmanager
    def _faults(self, row: Conversation) -> Iterator[None]:
        """A template is a program of its own: whatever it raises is a fault of this chat, but for one that is none."""
        try:
            yield
        except UnshownTurn as turn:
            rule = (
                "to mask all but the assistant, a chat template must write what comes before a turn the same whatever "
                "follows, and show where the turn ends."
            )
            if turn.index == 0 and row.messages[0].role == "assistant":
                rule = (
                    "to mask all but the assistant of a chat that the assistant begins, a chat template must show "
                    "where the first turn begins and ends."
                )
            remedy = "data.loss_on=all needs none; data.template has others."
            found = f"{self._name} does not, message {turn.index + 1}. {remedy}"
            raise RowFault("unmaskable", where=row.where, rule=rule, found=found) from None
        except TemplateSyntaxError as error:  # also a filter that Jinja does not know
            line = error.lineno - ("strftime_now" in self._template)  # without_today puts a line before it
            reason = (error.message or "").rstrip(".")
            raise RecipeError(
                f"a chat template must be valid Jinja.\nFound: {self._name}, line {line}: {reason}.\n"
                "Repair it (chat_template.jinja, or chat_template in tokenizer_config.json, in the model's folder), or "
                "set data.template to one that ships here."
            ) from error
        except Exception as error:
            found = f"{type(error).__name__}: {shortened(' '.join(str(error).split()), 200)}"
            rule = f"the chat template ({self._name}) must accept the conversation."
            remedy = f"{SKIP} If the template is at fault, repair it or set another data.template."
            raise RowFault("template", where=row.where, rule=rule, found=found, remedy=remedy) from error


def render_text(row: PlainText, loss_on: str) -> Rendered:
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


def _is_cut(messages: Messages, text: str) -> bool:
    """Whether the text lacks a message's content, or a part of it, such as thoughts. Whitespace may differ, and blank
    thoughts, of which no word can be lost.
    """
    contents = [message["content"].strip() for message in messages]
    return not _has_all(text, contents) and not _has_all(_joined(text), [_joined(content) for content in contents])


def _joined(text: str) -> str:
    return "".join(text.split()).replace("<think></think>", "")


def _has_all(text: str, parts: Sequence[str]) -> bool:
    """Looks for each part behind the one before: so a long chat is read once. Templates move system messages."""
    end = 0
    for part in parts:
        start = text.find(part, end)
        if start < 0 and (start := text.find(part)) < 0:
            return False
        end = start + len(part)
    return True
