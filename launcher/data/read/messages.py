"""Messages of a row, in the OpenAI form {"role", "content"} and in that of sharegpt {"from", "value"}.

What else a message says is handed to the chat template (Message.extra) or decides what the loss sees (Message.train).
unused.py has refused what is not honoured before.
"""

from typing import Any, NamedTuple

from launcher.data.read.rows import ROLES, SHAREGPT_ROLES, Message, RowFault, shown_under, shown_value, wrong_type
from launcher.data.read.tool_fields import calls_of
from launcher.data.read.unused import FLAGS, REASONING, has_no_value, honoured, truth

CALL = '{"function": {"name", "arguments"}}'


class MessageKeys(NamedTuple):
    """Where a message has its role and its text, and which roles there are: in the source -> in a Message."""

    role: str
    text: str
    roles: dict[str, str]


MESSAGE = MessageKeys("role", "content", {role: role for role in ROLES})
TURN = MessageKeys("from", "value", {**SHAREGPT_ROLES, **MESSAGE.roles})


def for_template(message: Message) -> dict[str, Any]:
    """The message as chat templates take it. They read thoughts under several names: it has them under each."""
    thoughts = dict.fromkeys(REASONING, message.reasoning) if "reasoning_content" in message.extra else {}
    return {"role": message.role, "content": message.content, **message.extra, **thoughts}


def messages_of(fields: dict[str, Any], column: str, where: str, keys: MessageKeys = MESSAGE) -> tuple[Message, ...]:
    """The messages of a column. Raises RowFault where it holds something else."""
    items = fields.get(column)
    rule = f'"{column}" is a list of {{"{keys.role}", "{keys.text}"}} objects.'
    if isinstance(items, list):
        return tuple([_message(item, where, keys) for item in items])
    if not isinstance(items, str) or not items.lstrip().startswith("["):
        raise wrong_type(where, rule, shown_under(column, fields))
    remedy = "Save the data as .jsonl or .parquet, with the list as a list; a cell of a .csv file is text."
    raise wrong_type(where, rule, f"a list written as text, {shown_value(items)}", remedy)


def _message(item: Any, where: str, keys: MessageKeys) -> Message:
    if not isinstance(item, dict):
        raise wrong_type(where, f'a message is a {{"{keys.role}", "{keys.text}"}} object.', shown_value(item))
    given = item.get(keys.role)
    if not isinstance(given, str) or given not in keys.roles:
        rule = f"a role is one of {', '.join(keys.roles)}."
        raise RowFault("unknown_role", where=where, rule=rule, found=shown_under(keys.role, item))
    role, text = keys.roles[given], item.get(keys.text)
    if isinstance(text, str) and given != "function_call" and len(item) == 2:  # nothing else: most messages
        return Message(role, text)
    extra = _extra(item, role, where)
    if given == "function_call":
        rule = f'the "{keys.text}" of function_call is a call as JSON, {{"name", "arguments"}}, or a list of them.'
        calls, text = calls_of(text, where, rule=rule), ""
        if not calls or "tool_calls" in extra:
            raise wrong_type(where, rule, "tool_calls beside it" if calls else shown_under(keys.text, item))
        extra["tool_calls"] = calls
    elif text is None and ("tool_calls" in extra or "reasoning_content" in extra):
        text = ""
    elif not isinstance(text, str):
        text = _text_of_parts(text, item, where, keys)
    return Message(role, text, extra, _flag(item, role, where))


def _extra(item: dict[str, Any], role: str, where: str) -> dict[str, Any]:
    """What of a message the template gets beside role and content; keys without a value are left out."""
    extra: dict[str, Any] = {
        key: str(item[key])
        for key in ("name", "tool_call_id")
        if not has_no_value(item.get(key)) and honoured(key, item[key], role)
    }
    if role == "assistant":
        rule = f'"tool_calls" is a list of {CALL} objects, the arguments an object, or such a list as JSON.'
        if calls := calls_of(item.get("tool_calls"), where, rule=rule):
            extra["tool_calls"] = calls
        thoughts = {item[key] for key in REASONING if isinstance(item.get(key), str) and not has_no_value(item[key])}
        if len(thoughts) > 1:
            raise wrong_type(where, f"a message has its thoughts once, in one of {', '.join(REASONING)}.", "two texts")
        if thoughts:
            extra["reasoning_content"] = thoughts.pop()
    return extra


def _flag(item: dict[str, Any], role: str, where: str) -> bool | None:
    flags = {truth(item[key]) for key in FLAGS if key in item and honoured(key, item[key], role)} - {None}
    if len(flags) > 1:
        raise wrong_type(where, 'the "weight" and the "train" of a message say the same.', "one yes, one no")
    return flags.pop() if flags else None


def _text_of_parts(text: Any, item: dict[str, Any], where: str, keys: MessageKeys) -> str:
    rule = f'the "{keys.text}" of a message is a string or a list of {{"type": "text", "text"}} parts (here of '
    rule += f"{item[keys.role]})."
    if not isinstance(text, list):
        raise wrong_type(where, rule, shown_under(keys.text, item))
    return "".join([_text_of_part(part, where, rule) for part in text])


def _text_of_part(part: Any, where: str, rule: str) -> str:
    if not isinstance(part, dict):
        raise wrong_type(where, rule, f"a list with {shown_value(part)}")
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise wrong_type(where, rule, f"a list with a part of type {shown_value(part.get('type'))}")
    return str(part["text"])
