"""Keys that no format uses. Those that would change what is learned are refused or dropped; the others are counted."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, NamedTuple

from launcher.data.read.rows import SHAREGPT_ROLES, RowFault, shown_value
from launcher.recipe.data_section import DataSection

# What a key says (rows_dropped_<it> counts the rows that are refused for it) -> its names, of columns and of messages.
_MEANINGS = {
    "tools": "tools functions tool_calls tool_call_id function_call",
    "reasoning": "reasoning_content reasoning reasoning_details thinking thinking_content thought thoughts",
    "weight": "weight weights loss loss_weight sample_weight train trainable train_on_turn loss_mask mask masked "
    "train_detail training_detail label completion_mask assistant_mask assistant_masks prompt_mask labels_mask",
    "packed": "position_ids seq_lengths cu_seqlens",
    "media": "image images video videos audio audios",
    "context": "system system_prompt system_message history documents chat_template_kwargs name",
    "preference": "rejected",
}
MEANING_OF = {name.replace("_", ""): meaning for meaning, names in _MEANINGS.items() for name in names.split()}
OF_PARTS = {"type", "text"}  # what is used of the parts of a message's content
OF_MESSAGES = {"name", "loss"}  # as columns they may be anything
REASONING = ("reasoning_content", "thinking", "reasoning")  # thoughts of a message, under the names that are honoured
FLAGS = ("weight", "train")  # of a message: whether the loss sees it
_OF_ROLE = {"assistant": {"tool_calls", *REASONING}, "tool": {"name", "tool_call_id"}}
_RULES_OF_FLAGS = (
    'a "weight" of 0 or a "train" of false takes a turn of the assistant from what is learned, 1 and true keep it;',
    "with data.loss_on=all every message is learned;",
)
_TRUTH = {"true": 1.0, "yes": 1.0, "on": 1.0, "false": 0.0, "no": 0.0, "off": 0.0}
MAX_KEYS_COUNTED = 30  # names of unused keys that are counted one by one: rows may have any number of keys
UNUSED_REMEDY = (
    "Remove it, set data.unused=drop to train without it (counted), or data.bad_rows=skip to drop such rows."
)


class UsedKeys(NamedTuple):
    """What a format uses of a row: its columns, those of them that hold messages, and the keys of any message.

    Of a message `honoured` is used too, and "tools" beside a list of messages.
    """

    columns: frozenset[str]
    messages: tuple[str, ...] = ()
    of_message: frozenset[str] = frozenset()


def honoured(key: str, value: Any, role: Any) -> bool:
    """Whether this key of a message with this role changes what is learned as it says. Others are left to
    `unused_keys`; so are flags that ask for more than a turn of the assistant's, learned or not.
    """
    role = _plain_role(role)
    if key in FLAGS:
        return truth(value) is False or (truth(value) is True and role == "assistant")
    is_told = isinstance(value, str) or key == "tool_calls" or (key == "tool_call_id" and type(value) is int)
    return is_told and key in _OF_ROLE.get(role, ())


def _plain_role(role: Any) -> Any:
    return SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else None


def truth(value: Any) -> bool | None:
    """The flag that a value says: true, 1, "yes" and their like; None if it says neither."""
    value = _TRUTH.get(value.strip().lower(), value) if isinstance(value, str) else value
    try:
        return {0.0: False, 1.0: True}.get(float(value))
    except (TypeError, ValueError, OverflowError):
        return None


def unused_keys(fields: Mapping[str, Any], used: UsedKeys, where: str, *, data: DataSection) -> list[str]:
    """The counters of what a row has and its format does not use: unused_key_<name>, dropped_key_<name>. Keys without
    a value (null, "", [], {}) are none.

    Raises RowFault for a key that would change what is learned; with data.unused=drop it is left out.
    """
    keys: dict[str, None] = {}  # in the order of the row, each once
    sees_all = data.loss_on == "all"
    for column, key, value, role in _unused(fields, used, sees_all):
        name, known = f"{column}.{key}" if column else key, re.sub(r"[-_\s]", "", key.lower())
        meaning = MEANING_OF.get(known) if column or known not in OF_MESSAGES else None
        if meaning is None or (meaning == "weight" and _says_what_happens(known, value, role, used, sees_all)):
            keys[f"unused_key_{shown_value(name)[1:-1]}"] = None
        elif data.unused == "drop":
            keys[f"dropped_key_{name}"] = None
        else:
            rule = "a key that changes what is learned is honoured or refused;"
            if column and meaning == "weight":
                rule = _RULES_OF_FLAGS[sees_all]
            found = f'"{key}": {shown_value(value)}' + (
                "" if not column else f" in a message of role {shown_value(role)}"
            )
            of_another = bool(column) and meaning == "weight" and not sees_all and _plain_role(role) != "assistant"
            rule = f'{rule} "{name}" is not honoured{" here: it belongs to turns of the assistant" * of_another}.'
            raise RowFault(meaning, where=where, rule=rule, found=found, remedy=UNUSED_REMEDY)
    return list(keys)


def count_unused(keys: Iterable[str], counts: Counter[str]) -> None:
    """Adds a row's counters to `counts`, in which the number of names stays small."""
    for key in keys:
        if key not in counts and sum("_key_" in known for known in counts) >= MAX_KEYS_COUNTED:
            key = f"{key.partition('_key_')[0]}_key_(others)"
        counts[key] += 1


def unused_notes(counts: Mapping[str, int]) -> Iterator[str]:
    """What the counters of unused keys say, for preview and report."""
    for section, prefix in (("data", ""), ("data.validation", "validation_")):
        for kind, text in (("unused", "nothing uses"), ("dropped", "dropped, though it changes what is learned:")):
            start = f"{prefix}{kind}_key_"
            rows = {key.removeprefix(start): count for key, count in counts.items() if key.startswith(start)}
            if rows:
                named = ", ".join(f"{name} ({count:,} row{'s' * (count > 1)})" for name, count in rows.items())
                yield f"{section}: {text} {named}"


def _unused(fields: Mapping[str, Any], used: UsedKeys, sees_all: bool) -> Iterator[tuple[str, str, Any, Any]]:
    """Each key that has a value and is not used: (path of what has it or "", key, value, role of its message)."""
    lists = {column: items for column in used.messages if isinstance(items := fields.get(column), list)}
    for key, value in fields.items():
        if key not in used.columns and not (key == "tools" and lists) and not has_no_value(value):
            yield "", key, value, None
    for column, messages in lists.items():
        for message in messages:
            if isinstance(message, dict) and not _is_plain(message, used.of_message):
                role = message.get("role") or message.get("from")
                for path, key, value in _unused_of_message(message, column, used.of_message):
                    if path != column or not honoured(key, value, role) or (key in FLAGS and sees_all):
                        yield path, key, value, role


def _is_plain(message: Mapping[str, Any], used: Set[str]) -> bool:
    """Whether a message has nothing that would have to be looked at: most have not."""
    return message.keys() <= used and list not in map(type, message.values())


def _unused_of_message(message: Mapping[str, Any], column: str, used: Set[str]) -> Iterator[tuple[str, str, Any]]:
    for key, value in message.items():
        if key not in used:
            if not has_no_value(value):
                yield column, key, value
        elif isinstance(value, list):  # parts of a content
            for part in value:
                for inner, of_part in part.items() if isinstance(part, dict) else ():
                    if inner not in OF_PARTS and not has_no_value(of_part):
                        yield f"{column}.{key}", inner, of_part


def has_no_value(value: Any) -> bool:
    """Whether a value is the same as none: null, NaN, "", [], {}, an object of nulls."""
    if isinstance(value, dict):  # Parquet has every field of an object, and null for those that a row lacks
        return all(map(has_no_value, value.values()))
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")  # lists and objects may be written as JSON
    return value is None or value != value or (isinstance(value, list | tuple) and not value)  # NaN: null of pandas


def _says_what_happens(key: str, value: Any, role: Any, used: UsedKeys, sees_all: bool) -> bool:
    """Whether a weight asks for nothing else than is done: an answer has the weight 1, other messages have 0.

    A label other than 0 is a class of texts, or says that the answer is good. A column "train" may name a split.
    """
    if isinstance(value, str):  # cells of .csv files
        word = value.strip().lower()
        value = _TRUTH.get(word, value) if key != "label" or word in ("true", "false") else value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return key == "label" or (key == "train" and role is None and isinstance(value, str))
    if key == "label":
        return number > 0 or (value is not False and used.columns == {"text"})
    if key == "mask":  # 1 says "learned" to some, "not learned" to others
        return False
    if key == "masked":
        number = 1 - number
    answers = sees_all or role is None or _plain_role(role) == "assistant"
    return number == (1 if answers else 0)
