"""Raw rows of every format become conversations, texts or token ids.

format              columns                     row
messages            messages                    [{"role", "content"}, …] -> Conversation
sharegpt            conversations               [{"from", "value"}, …] -> Conversation; items with "role" are messages
alpaca              instruction, input, output  -> Conversation that ends in two messages; answer: the last
prompt_completion   prompt, completion          strings -> PlainText; message lists -> Conversation; answer: completion
text                text                        -> PlainText
tokens              input_ids                   -> TokenIds; labels and attention_mask may stand beside (token_ids.py)

The first three may have a column "system", a Conversation's first message; alpaca "history", pairs of messages before.
unused.py has what else a row may hold. Faulty rows follow data.bad_rows. Empty rows are always dropped and counted.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from launcher.data.read.rows import (
    ROLES,
    SKIP,
    Conversation,
    Feed,
    Message,
    PlainText,
    RawRow,
    Row,
    RowFault,
    TokenIds,
    shown_under,
    shown_value,
    too_large,
)
from launcher.data.read.unused import UsedKeys, count_unused, unused_keys
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection

Fields = dict[str, Any]
RENAME = (
    "Name them beside the source's path, such as columns: {prompt: question, completion: answer}. "
    "If only some rows lack them, data.bad_rows=skip drops such rows and counts them."
)
RowParser = Callable[[Fields, str], Row | None]  # (fields, where) of a raw row -> the row; None: it is empty


def read_rows(feeds: Iterable[Feed], *, data: DataSection, counts: Counter[str]) -> Iterator[Row]:
    """The usable rows of the feeds. Adds to `counts` as it goes: rows_read, rows_dropped_<reason>, and of the usable
    rows unused_key_<name> and dropped_key_<name>.

    rows_read = rows yielded + all dropped. A feed without usable rows is no error here. A source's first row tells the
    format of all its feeds.

    Raises DataError: a row is faulty and data.bad_rows is "raise" (a RowFault), the columns fit several formats, or the
    source cannot be read any further.
    """
    source, format = None, None
    for feed in feeds:
        if source != (feed.source, feed.format):
            source, format = (feed.source, feed.format), _FORMATS.get(feed.format)
        for raw in feed.raw_rows():
            counts["rows_read"] += 1
            try:
                if isinstance(raw, RowFault):
                    raise raw
                format = format or _FORMATS[detected_format(raw.fields, raw.where)]
                row, unused = _parsed(raw, format, data)
            except RowFault as fault:
                if data.bad_rows == "raise":
                    raise
                counts[f"rows_dropped_{fault.reason}"] += 1
                continue
            if row is None:
                counts["rows_dropped_empty"] += 1
            else:
                count_unused(unused, counts)
                yield row


def _parsed(raw: RawRow, format: "_Format", data: DataSection) -> tuple[Row | None, list[str]]:
    """The row, and the counters of its unused keys."""
    if raw.fields.keys().isdisjoint(format.columns):
        expected = " and ".join(map(shown_value, format.columns))
        rule = f"all rows of a source have its format, here with the column {expected}."
        columns = shown_value(f"the columns {', '.join(sorted(raw.fields)) or '(none)'}")
        raise _wrong_type(raw.where, rule, columns, f"Name files of another format as sources of their own. {SKIP}")
    unused = unused_keys(raw.fields, format.used, raw.where, drop=data.unused == "drop")
    row = format.parse(raw.fields, raw.where)
    if row is not None and row.characters > data.max_row_bytes:
        raise too_large(raw.where, f"{row.characters:,} characters", data.max_row_bytes)
    return row, unused


def detected_format(fields: Fields, where: str) -> str:
    """The name of the one format whose columns a source's first row has. Raises RowFault if there is none, DataError
    if there are several."""
    names = [name for name, format in _FORMATS.items() if fields.keys() >= set(format.columns)]
    if len(names) == 1:
        return names[0]
    columns = shown_value(f"the columns {', '.join(sorted(fields)) or '(none)'}")
    if names:
        raise DataError(
            f"{where}: a source has one format.\nFound: {columns}.\n"
            f"Say which of them holds the data with format: {' or format: '.join(names)} beside the source's path."
        )
    known = "; ".join(" and ".join(f'"{column}"' for column in format.columns) for format in _FORMATS.values())
    raise _wrong_type(where, f"a row has the columns of a format: {known}.", columns, RENAME)


def _parse_messages(fields: Fields, where: str) -> Conversation | None:
    messages = _messages(fields, "messages", where)
    return Conversation(_system(fields, where, messages) + messages, where) if messages else None


def _parse_sharegpt(fields: Fields, where: str) -> Conversation | None:
    turns = fields.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    keys = _MESSAGE if first.get("from") is None and first.get("role") is not None else _TURN
    messages = _messages(fields, "conversations", where, keys)
    return Conversation(_system(fields, where, messages) + messages, where) if messages else None


def _parse_alpaca(fields: Fields, where: str) -> Conversation | None:
    instruction, output = _string(fields, "instruction", where), _string(fields, "output", where)
    context = _string(fields, "input", where) if fields.get("input") is not None else ""
    before = _system(fields, where) + _history(fields, where)
    if not output.strip():
        return None
    prompt = "\n\n".join(part for part in (instruction, context) if part.strip())
    messages = (*before, Message("user", prompt), Message("assistant", output))
    return Conversation(messages, where, answer=len(messages) - 1)


def _system(fields: Fields, where: str, messages: tuple[Message, ...] = ()) -> tuple[Message, ...]:
    """The column "system" as the message that comes before the others, if it is there."""
    text = _string(fields, "system", where) if fields.get("system") is not None else ""
    if not text.strip():
        return ()
    if messages and messages[0].role == "system":
        if messages[0].content == text:
            return ()
        rule = 'a conversation has one system message: in the column "system", or as its first message.'
        raise _wrong_type(where, rule, f"{shown_value(text)} and {shown_value(messages[0].content)}")
    return (Message("system", text),)


def _history(fields: Fields, where: str) -> tuple[Message, ...]:
    pairs = fields.get("history")
    if pairs is None or pairs == "":
        return ()
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise _wrong_type(where, '"history" is a list of [question, answer] pairs of strings.', shown_value(pair))
    return tuple(Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True))


def _parse_prompt_completion(fields: Fields, where: str) -> Row | None:
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return PlainText(prompt + completion, where, answer=len(prompt)) if completion.strip() else None
    if isinstance(prompt, list) and isinstance(completion, list):
        question, answer = _messages(fields, "prompt", where), _messages(fields, "completion", where)
        if not any(message.content.strip() for message in answer):
            return None
        return Conversation(question + answer, where, answer=len(question))
    column = "completion" if isinstance(prompt, str | list) else "prompt"
    rule = f'"prompt" and "completion" are two strings or two lists of messages (here "{column}").'
    raise _wrong_type(where, rule, shown_under(column, fields))


def _parse_text(fields: Fields, where: str) -> PlainText | None:
    text = _string(fields, "text", where)
    return PlainText(text, where) if text.strip() else None


def _parse_tokens(fields: Fields, where: str) -> TokenIds | None:
    from launcher.data.read.token_ids import parse_token_ids  # loads numpy

    return parse_token_ids(fields, where)


class _Format(NamedTuple):
    columns: tuple[str, ...]  # that `auto` recognises it by
    parse: RowParser
    used: UsedKeys


_ROLE_CONTENT = frozenset({"role", "content"})
_FORMATS = {
    "messages": _Format(
        ("messages",), _parse_messages, UsedKeys(frozenset({"messages", "system"}), ("messages",), _ROLE_CONTENT)
    ),
    "sharegpt": _Format(
        ("conversations",),
        _parse_sharegpt,
        UsedKeys(frozenset({"conversations", "system"}), ("conversations",), _ROLE_CONTENT | {"from", "value"}),
    ),
    "alpaca": _Format(
        ("instruction", "output"),
        _parse_alpaca,
        UsedKeys(frozenset({"instruction", "input", "output", "system", "history"})),
    ),
    "prompt_completion": _Format(
        ("prompt", "completion"),
        _parse_prompt_completion,
        UsedKeys(frozenset({"prompt", "completion"}), ("prompt", "completion"), _ROLE_CONTENT),
    ),
    "text": _Format(("text",), _parse_text, UsedKeys(frozenset({"text"}))),
    "tokens": _Format(("input_ids",), _parse_tokens, UsedKeys(frozenset({"input_ids", "labels", "attention_mask"}))),
}


OUR_COLUMNS = frozenset[str]().union(*(format.used.columns for format in _FORMATS.values()))
OPTIONAL_COLUMNS = OUR_COLUMNS - {column for format in _FORMATS.values() for column in format.columns}
MESSAGE_COLUMNS = frozenset(column for format in _FORMATS.values() for column in format.used.messages)
MESSAGE_KEYS = frozenset[str]().union(*(format.used.of_message for format in _FORMATS.values()))


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
    raise _wrong_type(where, rule, f"a list written as text, {shown_value(items)}", remedy)


def _message(item: Any, where: str, keys: _Keys) -> Message:
    if not isinstance(item, dict):
        raise _wrong_type(where, f'a message is a {{"{keys.role}", "{keys.text}"}} object.', shown_value(item))
    role, text = item.get(keys.role), item.get(keys.text)
    if not isinstance(role, str) or role not in keys.roles:
        rule = f"a role is one of {', '.join(keys.roles)}."
        raise RowFault("unknown_role", where=where, rule=rule, found=shown_under(keys.role, item))
    if not isinstance(text, str):
        parts = '{"type": "text", "text"} parts'
        rule = f'the "{keys.text}" of a message is a string or a list of {parts} (here of {role}).'
        if not isinstance(text, list):
            raise _wrong_type(where, rule, shown_under(keys.text, item))
        text = "".join([_text_of_part(part, where, rule) for part in text])
    return Message(keys.roles[role], text)


def _text_of_part(part: Any, where: str, rule: str) -> str:
    if not isinstance(part, dict):
        raise _wrong_type(where, rule, f"a list with {shown_value(part)}")
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise _wrong_type(where, rule, f"a list with a part of type {shown_value(part.get('type'))}")
    return str(part["text"])


def _string(fields: Fields, column: str, where: str) -> str:
    value = fields.get(column)
    if not isinstance(value, str):
        raise _wrong_type(where, f'"{column}" is a string.', shown_under(column, fields))
    return value


def _wrong_type(where: str, rule: str, found: str, remedy: str = SKIP) -> RowFault:
    return RowFault("wrong_type", where=where, rule=rule, found=found, remedy=remedy)
