"""Raw rows of every format become conversations or texts.

format              columns                     row
messages            messages                    [{"role", "content"}, …] -> Conversation
sharegpt            conversations               [{"from", "value"}, …] -> Conversation; items with "role" are messages
alpaca              instruction, input, output  -> Conversation of two messages; answer: the second
prompt_completion   prompt, completion          strings -> Text; message lists -> Conversation; answer: the completion
text                text                        -> Text

Faulty rows follow data.bad_rows. Empty rows are always dropped and counted.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from launcher.data.read.rows import ROLES, SKIP, Conversation, Feed, Message, Row, RowFault, Text, shown, shown_under
from launcher.errors import DataError

Fields = dict[str, Any]
RowParser = Callable[[Fields, str], Row | None]  # (fields, where) of a raw row -> the row; None: it is empty


def read_rows(feed: Feed, *, bad_rows: str, counts: Counter[str]) -> Iterator[Row]:
    """The usable rows of a feed. Adds to `counts` as it goes: rows_read, rows_dropped_<reason>.

    rows_read = rows yielded + all dropped. A feed without usable rows is no error here.

    Raises DataError: a row is faulty and `bad_rows` is "raise" (a RowFault), the columns fit several formats, or the
    source cannot be read any further.
    """
    parse = None if feed.format == "auto" else _FORMATS[feed.format].parse
    for raw in feed.raw_rows():
        counts["rows_read"] += 1
        try:
            if isinstance(raw, RowFault):
                raise raw
            parse = parse or _detected(raw.fields, raw.where)
            row = parse(raw.fields, raw.where)
        except RowFault as fault:
            if bad_rows == "raise":
                raise
            counts[f"rows_dropped_{fault.reason}"] += 1
            continue
        if row is None:
            counts["rows_dropped_empty"] += 1
        else:
            yield row


def _detected(fields: Fields, where: str) -> RowParser:
    """The parser of the one format whose columns a source's first row has."""
    names = [name for name, format in _FORMATS.items() if fields.keys() >= set(format.columns)]
    if len(names) == 1:
        return _FORMATS[names[0]].parse
    columns = shown(f"the columns {', '.join(sorted(fields)) or '(none)'}")
    if names:
        raise DataError(
            f"{where}: a source has one format.\nFound: {columns}.\n"
            f"Say which of them holds the data with format: {' or format: '.join(names)} beside the source's path."
        )
    known = "; ".join(" and ".join(f'"{column}"' for column in format.columns) for format in _FORMATS.values())
    raise _wrong_type(where, f"a row has the columns of a format: {known}.", columns)


def _parse_messages(fields: Fields, where: str) -> Conversation | None:
    messages = _messages(fields, "messages", where)
    return Conversation(messages, where) if messages else None


def _parse_sharegpt(fields: Fields, where: str) -> Conversation | None:
    turns = fields.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    keys = _MESSAGE if first.get("from") is None and first.get("role") is not None else _TURN
    messages = _messages(fields, "conversations", where, keys)
    return Conversation(messages, where) if messages else None


def _parse_alpaca(fields: Fields, where: str) -> Conversation | None:
    instruction, output = _string(fields, "instruction", where), _string(fields, "output", where)
    context = _string(fields, "input", where) if fields.get("input") is not None else ""
    if not output.strip():
        return None
    prompt = "\n\n".join(part for part in (instruction, context) if part.strip())
    return Conversation((Message("user", prompt), Message("assistant", output)), where, answer=1)


def _parse_prompt_completion(fields: Fields, where: str) -> Row | None:
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Text(prompt + completion, where, answer=len(prompt)) if completion.strip() else None
    if isinstance(prompt, list) and isinstance(completion, list):
        question, answer = _messages(fields, "prompt", where), _messages(fields, "completion", where)
        if not any(message.content.strip() for message in answer):
            return None
        return Conversation(question + answer, where, answer=len(question))
    column = "completion" if isinstance(prompt, str | list) else "prompt"
    rule = f'"prompt" and "completion" are two strings or two lists of messages (here "{column}").'
    raise _wrong_type(where, rule, shown_under(column, fields))


def _parse_text(fields: Fields, where: str) -> Text | None:
    text = _string(fields, "text", where)
    return Text(text, where) if text.strip() else None


class _Format(NamedTuple):
    columns: tuple[str, ...]  # that `auto` recognises it by
    parse: RowParser


_FORMATS = {
    "messages": _Format(("messages",), _parse_messages),
    "sharegpt": _Format(("conversations",), _parse_sharegpt),
    "alpaca": _Format(("instruction", "output"), _parse_alpaca),
    "prompt_completion": _Format(("prompt", "completion"), _parse_prompt_completion),
    "text": _Format(("text",), _parse_text),
}


class _Keys(NamedTuple):
    """Where a message has its role and its text, and which roles there are: in the source -> in a Message."""

    role: str
    text: str
    roles: dict[str, str]


_MESSAGE = _Keys("role", "content", {role: role for role in ROLES})
_TURN = _Keys("from", "value", {"human": "user", "gpt": "assistant", **_MESSAGE.roles})


def _messages(fields: Fields, column: str, where: str, keys: _Keys = _MESSAGE) -> tuple[Message, ...]:
    items = fields.get(column)
    rule = f'"{column}" is a list of {{"{keys.role}", "{keys.text}"}} objects.'
    if isinstance(items, list):
        return tuple([_message(item, where, keys) for item in items])
    if not isinstance(items, str) or not items.lstrip().startswith("["):
        raise _wrong_type(where, rule, shown_under(column, fields))
    remedy = "Save the data as .jsonl or .parquet, with the list as a list; a cell of a .csv file is text."
    raise _wrong_type(where, rule, f"a list written as text, {shown(items)}", remedy)


def _message(item: Any, where: str, keys: _Keys) -> Message:
    if not isinstance(item, dict):
        raise _wrong_type(where, f'a message is a {{"{keys.role}", "{keys.text}"}} object.', shown(item))
    role, text = item.get(keys.role), item.get(keys.text)
    if not isinstance(role, str) or role not in keys.roles:
        rule = f"a role is one of {', '.join(keys.roles)}."
        raise RowFault("unknown_role", where=where, rule=rule, found=shown_under(keys.role, item))
    if item.get("tool_calls") or item.get("function_call"):
        rule = "a message is text; calls of tools are not supported."
        raise RowFault("tools", where=where, rule=rule, found=f"tool calls in a message of role {role}")
    if not isinstance(text, str):
        parts = '{"type": "text", "text"} parts'
        rule = f'the "{keys.text}" of a message is a string or a list of {parts} (here of {role}).'
        if not isinstance(text, list):
            raise _wrong_type(where, rule, shown_under(keys.text, item))
        text = "".join([_text_of_part(part, where, rule) for part in text])
    return Message(keys.roles[role], text)


def _text_of_part(part: Any, where: str, rule: str) -> str:
    if not isinstance(part, dict):
        raise _wrong_type(where, rule, f"a list with {shown(part)}")
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise _wrong_type(where, rule, f"a list with a part of type {shown(part.get('type'))}")
    return str(part["text"])


def _string(fields: Fields, column: str, where: str) -> str:
    value = fields.get(column)
    if not isinstance(value, str):
        raise _wrong_type(where, f'"{column}" is a string.', shown_under(column, fields))
    return value


def _wrong_type(where: str, rule: str, found: str, remedy: str = SKIP) -> RowFault:
    return RowFault("wrong_type", where=where, rule=rule, found=found, remedy=remedy)
