"""Whether a template has written all that a chat holds.

A template is a program, and may leave out what it does not know: thoughts, tools, calls, a role.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from launcher.data.chat.spelled_out import Messages, Tools

QUESTION: Messages = [{"role": "user", "content": "9793"}]
_DESCRIBED = {"name": "f3141", "description": "8462", "parameters": {"type": "object", "properties": {}}}
SAMPLE_TOOLS: Tools = [{"type": "function", "function": _DESCRIBED}]


def is_cut(messages: Messages, text: str) -> bool:
    """Whether the text lacks a message's content, or a part of it, such as thoughts; or a call. Whitespace may differ,
    and blank thoughts, of which no word can be lost.
    """
    parts: list[tuple[str, ...]]
    if max(map(len, messages)) == 2 and "tool" not in [message["role"] for message in messages]:  # the usual, fast
        parts = [(message["content"].strip(),) for message in messages]
    else:
        parts = [part for message in messages for part in _parts(message)]
    return not _has_all(text, parts) and not _has_all(_joined(text), [tuple(map(_joined, forms)) for forms in parts])


def has_tools(tools: Tools, text: str) -> bool:
    """Whether the text has the names of these tools."""
    return _has_all(text, [_forms(tool["function"]["name"]) for tool in tools])


def lost_call(messages: Messages, turns: Sequence[int], seen: str) -> int | None:
    """The first of these turns with a tool call that is not whole in what the loss sees of them; None: all are."""
    end = 0
    for turn in turns:
        for call in messages[turn].get("tool_calls", []):
            name, *arguments = _call_parts(call)
            begin = next((place for form in name if (place := seen.find(form, end)) >= 0), None)
            if begin is None or any(not any(form in seen[begin:] for form in forms) for forms in arguments):
                return turn
            end = begin + len(name[0])
    return None


def _parts(message: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """What a message says, piece by piece in the order of most templates; each in the forms that it may have."""
    if "reasoning_content" in message:
        yield (message["reasoning_content"].strip(),)
    content = message["content"].strip()
    yield _forms(content) if message["role"] == "tool" else (content,)
    for call in message.get("tool_calls", []):
        yield from _call_parts(call)


def _call_parts(call: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield _forms(call["function"]["name"])
    yield from _leaves(call["function"]["arguments"])


def _leaves(value: Any) -> Iterator[tuple[str, ...]]:
    """Keys and values of arguments, which templates write as JSON or in forms of their own."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield _forms(str(key))
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield _forms(value.strip()) if isinstance(value, str) else (json.dumps(value), str(value))


def _forms(text: str) -> tuple[str, ...]:
    """A text as it is, and as it stands in JSON, in which templates write strings of tools."""
    forms = (text, json.dumps(text, ensure_ascii=False)[1:-1])
    return forms if text.isascii() else (*forms, json.dumps(text)[1:-1])


def _joined(text: str) -> str:
    return "".join(text.split()).replace("<think></think>", "")


def _has_all(text: str, parts: Sequence[tuple[str, ...]]) -> bool:
    """Looks for each part behind the one before: so a long chat is read once. Templates move system messages."""
    end = 0
    for forms in parts:
        start = text.find(forms[0], end)
        if start < 0:
            place = next((found for form in forms if (found := _place(text, form, end)) is not None), None)
            if place is None:
                return False
            start = place - len(forms[0])
        end = start + len(forms[0])
    return True


def _place(text: str, part: str, begin: int) -> int | None:
    """Where a part ends that is looked for from `begin` on first, then everywhere."""
    start = text.find(part, begin)
    if start < 0 and (start := text.find(part)) < 0:
        return None
    return start + len(part)
