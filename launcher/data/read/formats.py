"""Raw rows of every format become conversations, texts or token ids.

format              columns                     row
messages            messages                    [{"role", "content"}, …] -> Conversation (messages.py)
sharegpt            conversations               [{"from", "value"}, …] -> Conversation; items with "role" are messages
alpaca              instruction, input, output  -> Conversation that ends in two messages; answer: the last
prompt_completion   prompt, completion          strings -> PlainText; message lists -> Conversation; answer: completion
text                text                        -> PlainText
tokens              input_ids                   -> TokenIds; labels and attention_mask may stand beside (token_ids.py)

The first three may have a column "system", a Conversation's first message; alpaca "history", pairs of messages before.
Rows of messages may have "tools" (tool_fields.py).
unused.py has what else a row may hold. Faulty rows follow data.bad_rows. Empty rows are always dropped and counted.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from launcher.data.read.csv_files import DELIMITERS
from launcher.data.read.messages import MESSAGE, TURN, messages_of
from launcher.data.read.rows import (
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
    wrong_type,
)
from launcher.data.read.tool_fields import tools_of, without_filled_nulls
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
        remedy = _undivided(raw.fields, raw.where) or "Name files of another format as sources of their own."
        raise wrong_type(raw.where, rule, columns, f"{remedy} {SKIP}")
    fields = without_filled_nulls(raw.fields, format.used.messages) if raw.null_filled else raw.fields
    unused = unused_keys(fields, format.used, raw.where, data=data)
    row = format.parse(fields, raw.where)
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
    remedy = " ".join(filter(None, (_undivided(fields, where), RENAME)))
    raise wrong_type(where, f"a row has the columns of a format: {known}.", columns, remedy)


def _undivided(fields: Fields, where: str) -> str:
    """What is said of a table of text with one column, if a mark in its name may divide it."""
    mark = next((mark for mark in DELIMITERS if any(mark in name for name in fields)), None)
    if len(fields) != 1 or mark is None or not re.search(r"\.[ct]sv(\.gz|\.zst)? row \d+$", where, re.IGNORECASE):
        return ""
    named = f"set delimiter: {shown_value(mark)} beside the path"
    return f"The table has one column: if {DELIMITERS[mark]} divide it, {named}."


def _parse_messages(fields: Fields, where: str) -> Conversation | None:
    messages = messages_of(fields, "messages", where)
    return _chat(fields, where, messages)


def _parse_sharegpt(fields: Fields, where: str) -> Conversation | None:
    turns = fields.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    keys = MESSAGE if first.get("from") is None and first.get("role") is not None else TURN
    messages = messages_of(fields, "conversations", where, keys)
    return _chat(fields, where, messages)


def _chat(fields: Fields, where: str, messages: tuple[Message, ...]) -> Conversation | None:
    tools = tools_of(fields["tools"], where) if "tools" in fields else ()
    return Conversation(_system(fields, where, messages) + messages, where, tools=tools) if messages else None


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
        raise wrong_type(where, rule, f"{shown_value(text)} and {shown_value(messages[0].content)}")
    return (Message("system", text),)


def _history(fields: Fields, where: str) -> tuple[Message, ...]:
    pairs = fields.get("history")
    if pairs is None or pairs == "":
        return ()
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise wrong_type(where, '"history" is a list of [question, answer] pairs of strings.', shown_value(pair))
    return tuple(Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True))


def _parse_prompt_completion(fields: Fields, where: str) -> Row | None:
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return PlainText(prompt + completion, where, answer=len(prompt)) if completion.strip() else None
    if isinstance(prompt, list) and isinstance(completion, list):
        question, answer = messages_of(fields, "prompt", where), messages_of(fields, "completion", where)
        if all(message.is_blank for message in answer):
            return None
        return Conversation(question + answer, where, len(question), tools_of(fields.get("tools"), where))
    column = "completion" if isinstance(prompt, str | list) else "prompt"
    rule = f'"prompt" and "completion" are two strings or two lists of messages (here "{column}").'
    raise wrong_type(where, rule, shown_under(column, fields))


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


OUR_COLUMNS = frozenset({"tools"}).union(*(format.used.columns for format in _FORMATS.values()))
OPTIONAL_COLUMNS = OUR_COLUMNS - {column for format in _FORMATS.values() for column in format.columns}
MESSAGE_COLUMNS = frozenset(column for format in _FORMATS.values() for column in format.used.messages)
MESSAGE_KEYS = frozenset[str]().union(*(format.used.of_message for format in _FORMATS.values()))


def _string(fields: Fields, column: str, where: str) -> str:
    value = fields.get(column)
    if not isinstance(value, str):
        raise wrong_type(where, f'"{column}" is a string.', shown_under(column, fields))
    return value
