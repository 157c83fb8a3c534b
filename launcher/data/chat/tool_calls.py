"""The form in which a template takes tool calls: what the content beside them is, and what the arguments are.

Most templates write arguments as JSON of an object, some add them to a string, as which OpenAI has them. Some write no
call beside the content "", some fail without a string. So a sample is tried: the first form under which a template
writes a call is the one.
"""

from collections.abc import Callable
from contextlib import suppress
from itertools import product
from json import dumps
from operator import methodcaller
from typing import Any, NamedTuple

from launcher.data.chat.left_out import QUESTION, lost_call
from launcher.data.chat.spelled_out import Messages


class CallForm(NamedTuple):
    """`content`: beside calls where there is none, None: without the key, as transformers makes of null.
    `text_arguments`: arguments as a string of JSON."""

    content: str | None = ""
    text_arguments: bool = False


def call_form(apply: Callable[[Messages], str]) -> CallForm:
    """The form that the template of `apply`, which renders chats, takes; the usual one if it writes calls in none."""
    for text_arguments, content in product((False, True), ("", None)):
        form = CallForm(content, text_arguments)
        for chat in _samples():
            with suppress(Exception):  # a template's own, of a form that it refuses
                if lost_call(chat, [1], apply(in_call_form(chat, form))) is None:
                    return form
    return CallForm()


def opening_behind(apply: Callable[[Messages], str], *, call: bool) -> str:
    """What a template writes behind an answer, or behind a tool call, where the chat goes on with a question or the
    result; "" where it then writes the turn before in another way, or refuses the sample."""
    answer: Messages = [{"role": "assistant", "content": "5926"}]
    chat = _samples()[1] if call else [*QUESTION, *answer, *QUESTION]
    with suppress(Exception):  # a template's own
        ended, followed = apply(chat[:2]), apply(chat)
        return followed[len(ended) :] if followed.startswith(ended) else ""
    return ""


def has_calls(messages: Messages) -> bool:
    return any(map(methodcaller("get", "tool_calls"), messages))


def in_call_form(messages: Messages, form: CallForm) -> Messages:
    """The messages with their tool calls in this form."""
    return [_message(message, form) if message.get("tool_calls") else message for message in messages]


def _message(message: dict[str, Any], form: CallForm) -> dict[str, Any]:
    changed = {} if message["content"].strip() else {"content": form.content}
    if form.text_arguments:
        functions = [call["function"] for call in message["tool_calls"]]
        texts = [{**f, "arguments": dumps(f["arguments"], ensure_ascii=False)} for f in functions]
        calls = zip(message["tool_calls"], texts, strict=True)
        return {**message, **changed, "tool_calls": [{**call, "function": text} for call, text in calls]}
    return {**message, **changed}


def _samples() -> list[Messages]:
    """Short chats with a call as their second message."""
    function = {"name": "f3141", "arguments": {"a5926": "5358"}}
    calls = [{"type": "function", "function": function, "id": "abcdefghi"}]  # an id as Mistral's templates ask for
    called: Messages = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}]
    return [called, [*called, {"role": "tool", "content": "2384", "name": "f3141", "tool_call_id": "abcdefghi"}]]
