"""Records become rows: every format there is gives conversations or texts, and nothing behind this module knows one.

format              columns                     row
messages            messages                    [{"role", "content"}, …] -> Conversation
sharegpt            conversations               [{"from", "value"}, …] -> Conversation; items with "role" are messages
alpaca              instruction, input, output  -> Conversation of two messages; answer: the second
prompt_completion   prompt, completion          strings -> Text; message lists -> Conversation; answer: the completion
text                text                        -> Text

Faults of a row follow data.bad_rows; empty rows are dropped and counted in either case.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from launcher.data.read.rows import ROLES, Conversation, Message, Row, RowFault, Text, shown, shown_under
from launcher.data.read.sources import Feed
from launcher.errors import DataError

Fields = dict[str, Any]
Reader = Callable[[Fields, str], Row | None]  # columns and place of a record -> its row; None: it is empty


def read_rows(feed: Feed, *, bad_rows: str, counts: Counter[str]) -> Iterator[Row]:
    """The usable rows of a feed, one at a time. While it goes on, adds to `counts`: rows_read, rows_dropped_<reason>.

    rows_read = rows yielded + all dropped. That none is left, the caller must judge.

    Raises DataError: a row is faulty and `bad_rows` is "raise" (a RowFault), the columns fit several formats, or the
    source cannot be read any further.
    """
    reader = None if feed.format == "auto" else _READERS[feed.format]
    for record in feed.records():
        counts["rows_read"] += 1
        fields, where = record.fields, record.where
        try:
            if isinstance(fields, RowFault):
                raise fields
            if reader is None:
                reader = _detected(fields, where)
            row = reader(fields, where)
        except RowFault as fault:
            if bad_rows == "raise":
                raise
            counts[f"rows_dropped_{fault.reason}"] += 1
            continue
        if row is None:
            counts["rows_dropped_empty"] += 1
        else:
            yield row


def _detected(fields: Fields, where: str) -> Reader:
    """The reader for the columns of a source's first row."""
    formats = [name for name, columns in _COLUMNS.items() if fields.keys() >= columns.keys()]
    if len(formats) == 1:
        return _READERS[formats[0]]
    found = shown(f"the columns {', '.join(sorted(fields)) or '(none)'}")
    if formats:
        raise DataError(
            f"{where}: a source has one format.\nFound: {found}.\n"
            f"Say which of them holds the data with format: {' or format: '.join(formats)} beside the source's path."
        )
    known = "; ".join(" and ".join(f'"{column}"' for column in columns) for columns in _COLUMNS.values())
    raise RowFault("wrong_type", where=where, rule=f"a row has the columns of a format: {known}.", found=found)


def _read_messages(fields: Fields, where: str) -> Conversation | None:
    messages = _messages(fields, "messages", where)
    return Conversation(messages, where) if messages else None


def _read_sharegpt(fields: Fields, where: str) -> Conversation | None:
    turns = fields.get("conversations")
    if not isinstance(turns, list):
        raise _no_list(fields, "conversations", '{"from", "value"}', where)
    if turns and isinstance(turns[0], dict) and turns[0].get("from") is None and turns[0].get("role") is not None:
        messages = _messages(fields, "conversations", where)
    else:
        messages = tuple([_turn(turn, where) for turn in turns])
    return Conversation(messages, where) if messages else None


def _read_alpaca(fields: Fields, where: str) -> Conversation | None:
    instruction, output = _string(fields, "instruction", where), _string(fields, "output", where)
    context = _string(fields, "input", where) if fields.get("input") is not None else ""
    if not output.strip():
        return None
    prompt = "\n\n".join(part for part in (instruction, context) if part.strip())
    return Conversation((Message("user", prompt), Message("assistant", output)), where, 1)


def _read_prompt_completion(fields: Fields, where: str) -> Row | None:
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Text(prompt + completion, where, len(prompt)) if completion.strip() else None
    if isinstance(prompt, list) and isinstance(completion, list):
        before, after = _messages(fields, "prompt", where), _messages(fields, "completion", where)
        answers = any(message.content.strip() for message in after)
        return Conversation(before + after, where, len(before)) if answers else None
    column = "completion" if isinstance(prompt, str | list) else "prompt"
    rule = f'"prompt" and "completion" are two strings or two lists of messages (here "{column}").'
    raise _wrong_type(where, rule, shown_under(column, fields))


def _read_text(fields: Fields, where: str) -> Text | None:
    text = _string(fields, "text", where)
    return Text(text, where) if text.strip() else None


_READERS: dict[str, Reader] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
    "text": _read_text,
}
_COLUMNS = {  # by which a format is told; dicts, for sets that keep their order
    "messages": dict.fromkeys(["messages"]),
    "sharegpt": dict.fromkeys(["conversations"]),
    "alpaca": dict.fromkeys(["instruction", "output"]),
    "prompt_completion": dict.fromkeys(["prompt", "completion"]),
    "text": dict.fromkeys(["text"]),
}
_SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def _messages(fields: Fields, column: str, where: str) -> tuple[Message, ...]:
    messages = fields.get(column)
    if not isinstance(messages, list):
        raise _no_list(fields, column, '{"role", "content"}', where)
    return tuple([_message(message, where) for message in messages])


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise _wrong_type(where, 'a message is a {"role", "content"} object.', shown(message))
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _unknown_role(where, ROLES, shown_under("role", message))
    if message.get("tool_calls") or message.get("function_call"):
        rule = "a message is text; calls of tools are not supported."
        raise RowFault("tools", where=where, rule=rule, found=f"tool calls in a message of role {role}")
    if not isinstance(content, str):
        content = _joined(message, where)
    return Message(role, content)


def _joined(message: Fields, where: str) -> str:
    content, role = message.get("content"), message["role"]
    rule = f'the "content" of a message is a string or a list of {{"type": "text", "text"}} parts (here of {role}).'
    if not isinstance(content, list):
        raise _wrong_type(where, rule, shown_under("content", message))
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            found = f"a part of type {shown(part.get('type'))}" if isinstance(part, dict) else shown(part)
            raise RowFault("wrong_type", where=where, rule=rule, found=f"a list with {found}")
    return "".join(part["text"] for part in content)


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise _wrong_type(where, 'a turn is a {"from", "value"} object.', shown(turn))
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise _unknown_role(where, tuple(_SPEAKERS), shown_under("from", turn))
    if not isinstance(value, str):
        raise _wrong_type(
            where, f'the "value" of a turn is a string (here from {speaker}).', shown_under("value", turn)
        )
    return Message(_SPEAKERS[speaker], value)


def _string(fields: Fields, column: str, where: str) -> str:
    value = fields.get(column)
    if not isinstance(value, str):
        raise _wrong_type(where, f'"{column}" is a string.', shown_under(column, fields))
    return value


def _wrong_type(where: str, rule: str, found: str) -> RowFault:
    return RowFault("wrong_type", where=where, rule=rule, found=found)


def _unknown_role(where: str, allowed: tuple[str, ...], found: str) -> RowFault:
    return RowFault("unknown_role", where=where, rule=f"a role is one of {', '.join(allowed)}.", found=found)


def _no_list(fields: Fields, column: str, item: str, where: str) -> RowFault:
    rule = f'"{column}" is a list of {item} objects.'
    value = fields.get(column)
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return _wrong_type(where, rule, shown_under(column, fields))
    remedy = "Save the data as .jsonl or .parquet, with the list as a list; a cell of a .csv file is text."
    return RowFault(
        "wrong_type", where=where, rule=rule, found=f"a list written as text, {shown(value)}", remedy=remedy
    )
