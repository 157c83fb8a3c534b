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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, groupby, pairwise
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from launcher.credentials import shortened
from launcher.data.chat.ends import Ends
from launcher.data.chat.left_out import QUESTION, SAMPLE_TOOLS, has_tools, is_cut, lost_call
from launcher.data.chat.named_templates import without_today
from launcher.data.chat.spelled_out import BEGIN, END, Messages, SpelledOut, Tools, restored
from launcher.data.chat.tool_calls import CallForm, call_form, has_calls, in_call_form, opening_behind
from launcher.data.chat.turns import SYSTEM, Span, Turns, UnshownTurn, may_be_unwritten
from launcher.data.read.rows import SKIP, Conversation, PlainText, RowFault
from launcher.errors import RecipeError
from launcher.records.counts import UNCLOSED

CUT = "rows_cut_by_template"
ENDLESS = "rows_without_end_token"
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True)
class Rendered:
    """A row as text. `spans`: the characters that the loss sees; None: all. `stand_ins`: the string that each
    replaces. `framed`: the text gets a begin and an end token when tokenised. `remarks`, `ends`: as of Document.
    """

    text: str
    spans: Sequence[Span] | None
    stand_ins: dict[str, str]
    framed: bool = False
    remarks: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The text as it reads, without stand-ins."""
        return restored(self.text, self.stand_ins)


class ChatRenderer:
    """Renders chats with the tokenizer's template. `name`: what errors call that template; `variant`: which it is, of
    a tokenizer with several. `stop_ids`: as of Ends."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        spelled_out: SpelledOut,
        name: str,
        variant: str | None = None,
        stop_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._spelled_out, self._name, self._variant = tokenizer, spelled_out, name, variant
        self._stop_ids = stop_ids
        # Any added token may end a turn, also one that is not special.
        self._end_tokens = tuple(token.content for token in tokenizer.added_tokens_decoder.values())

    def render(self, row: Conversation, loss_on: str) -> Rendered:
        """The chat with the spans that the loss sees: assistant turns, the completion's turns, or None for "all".

        Remarks CUT where the template leaves out text of a message, and ENDLESS where no stop token ends a
        turn.
        Raises RowFault: the template refuses the chat, or does not show where an assistant turn begins and ends; and
        RecipeError: it is no valid Jinja.
        """
        messages, tools, stand_ins = self._spelled_out.hide(row)
        turns = _supervised_turns(row, loss_on)
        apply = partial(self._apply, tools=tools)
        with self._faults(row):
            text = apply(messages)
            remarks: tuple[str, ...] = (CUT,) if is_cut(messages, text) or (tools and self._lacks(tools, text)) else ()
            answer_last = messages[-1]["role"] == "assistant" and not row.messages[-1].is_blank
            closing = self._appended["tool_calls" in messages[-1]] if answer_last else ""
            if loss_on == "all":
                return Rendered(self._ends.close_chat(text, closing), None, stand_ins, remarks=remarks)
            calls = has_calls(messages)
            if calls:
                self._check_calls(row, lost_call(messages, turns, text))
            find = self._marked_spans if self._marked_template else _spans_of_turns
            spans = find(messages, turns, text, self._turns.with_apply(apply) if tools else self._turns)
        closing = closing if turns[-1:] == [len(messages) - 1] else ""
        text, spans, ends = self._ends.close(text, spans, turns=len(turns), closing=closing)
        written = [text[slice(*span)] for span in spans]
        if self._marked_template and calls:  # a turn may have several spans
            self._check_calls(row, lost_call(messages, turns, "".join(written)))
        elif calls:
            for turn, part in zip(turns, written, strict=True):
                self._check_calls(row, lost_call(messages, [turn], part))
        remarks += (ENDLESS,) * (UNCLOSED in ends)
        if any(may_be_unwritten(messages[turn]) for turn in turns):
            spans = [
                s for s, part in zip(spans, written, strict=True) if self._spelled_out.control.sub("", part).strip()
            ]
        return Rendered(text, spans, stand_ins, remarks=remarks, ends=ends)

    def render_prompt(self, row: Conversation) -> Rendered:
        """The chat, then the generation prompt. Raises RowFault if the template refuses it."""
        messages, tools, stand_ins = self._spelled_out.hide(row)
        with self._faults(row):
            return Rendered(self._apply(messages, tools=tools, prompt=True), None, stand_ins)

    def _apply(
        self, messages: Messages, *, tools: Tools | None = None, prompt: bool = False, template: str | None = None
    ) -> str:
        if has_calls(messages):
            messages = in_call_form(messages, self._call_form)
        apply, template = self._tokenizer.apply_chat_template, template or self._template
        options: Any = {"tools": tools or None, "tokenize": False, "add_generation_prompt": prompt}
        return str(apply(messages, chat_template=template, **options))

    def _lacks(self, tools: Tools, text: str) -> bool:
        """Whether a tool is not written. Calls have its name as well, so a sample is tried too."""
        return not (self._writes_tools and has_tools(tools, text))

    @cached_property
    def _writes_tools(self) -> bool:
        for messages in (QUESTION, [SYSTEM, *QUESTION]):
            with suppress(Exception):  # a template's own
                if has_tools(SAMPLE_TOOLS, self._apply(messages, tools=SAMPLE_TOOLS)):
                    return True
        return False

    def _check_calls(self, row: Conversation, lost: int | None) -> None:
        """Raise RowFault if what the loss sees of this message lacks a tool call, or a part of its arguments."""
        if lost is not None:
            raise RowFault(
                "template",
                where=row.where,
                rule="the chat template must write the tool calls of a turn that is learned, within that turn.",
                found=f"the call of message {lost + 1} is not whole in what the loss sees ({self._name}).",
                remedy=f"Use a tokenizer whose template has tool calls, or data.template=auto for it. {SKIP}",
            )

    @cached_property
    def _call_form(self) -> CallForm:
        return call_form(self._raw)

    def _raw(self, messages: Messages) -> str:
        return str(self._tokenizer.apply_chat_template(messages, chat_template=self._template, tokenize=False))

    @cached_property
    def _template(self) -> str:
        return without_today(self._tokenizer.get_chat_template(self._variant))

    @cached_property
    def _turns(self) -> Turns:
        return Turns(self._apply, control=self._spelled_out.control, end_tokens=self._end_tokens)

    @cached_property
    def _ends(self) -> Ends:
        last, control = self._turns.last_token, self._spelled_out.control
        return Ends(self._tokenizer, stop_ids=self._stop_ids, last=last, control=control)

    @cached_property
    def _appended(self) -> tuple[str, str]:
        """What closes an answer that ends the chat without a stop token, and what a turn of tool calls."""
        answer, calls = (self._ends.closing_behind(opening_behind(self._apply, call=call)) for call in (False, True))
        return answer, calls

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

    def _marked_spans(self, messages: Messages, turns: Sequence[int], text: str, finder: Turns) -> list[Span]:
        """The spans of generation blocks, without those between the begin of another assistant turn and the next."""
        pieces = re.split(f"[{BEGIN}{END}]", finder.apply(messages, template=self._marked_template))
        if "".join(pieces) != text:
            raise UnshownTurn(turns[0] if turns else 0)
        borders = list(accumulate(map(len, pieces)))
        spans = list(zip(borders[::2], borders[1::2], strict=False))
        assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        groups = [(is_chosen, next(indices)) for is_chosen, indices in groupby(assistants, set(turns).__contains__)]
        begins = [0, *(finder.begin(messages, first, text) for _, first in groups[1:]), len(text)]
        chosen = [part for (is_chosen, _), part in zip(groups, pairwise(begins), strict=False) if is_chosen]
        return [span for span in spans if any(begin < span[1] <= end for begin, end in chosen)]

    @contextmanager
    def _faults(self, row: Conversation) -> Iterator[None]:
        """A template is a program of its own: whatever it raises is a fault of this chat, but for one that is none."""
        try:
            yield
        except RowFault:
            raise
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
            which = f"message {turn.index + 1}{', a call of tools' * bool(row.messages[turn.index].calls)}"
            found = f"{self._name} does not, {which}. {remedy}"
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
            if strangers := {message.role for message in row.messages} & {"developer", "tool"}:
                roles = " and ".join(sorted(strangers))
                remedy += f" It may not know the role {roles}: developer can be written as system, tool cannot."
            raise RowFault("template", where=row.where, rule=rule, found=found, remedy=remedy) from error


def render_text(row: PlainText, loss_on: str) -> Rendered:
    """Plain text, framed. A blank completion is not supervised, like a blank assistant turn."""
    if loss_on == "all":
        return Rendered(row.text, None, {}, framed=True)
    start = row.answer or 0
    spans = [(start, len(row.text))] if row.text[start:].strip() else []
    return Rendered(row.text, spans, {}, framed=True)


def _spans_of_turns(messages: Messages, turns: Sequence[int], text: str, finder: Turns) -> list[Span]:
    return finder.spans(messages, turns, text)


def _supervised_turns(row: Conversation, loss_on: str) -> list[int]:
    """The assistant's messages to supervise: all, the last, or those of the completion; none that the row takes out.
    Blank ones train nothing."""
    turns = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
    if loss_on == "last" or (loss_on == "completion" and row.answer is None):
        turns = turns[-1:]
    elif loss_on == "completion":
        turns = [turn for turn in turns if turn >= (row.answer or 0)]
    return [turn for turn in turns if not row.messages[turn].is_blank and row.messages[turn].train is not False]
