"""Tools and their calls, in the one form that chat templates read: OpenAI's, arguments as an object.

    tools        [{"type": "function", "function": {"name", "description", "parameters"}}, …]
    tool_calls   [{"type": "function", "function": {"name", "arguments": {…}}, "id"}, …]

Both may be JSON in a string; so may the arguments. The object under "function" may stand alone.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from launcher.data.read.rows import shown_value, wrong_type
from launcher.data.read.text_files import lone_surrogate
from launcher.data.read.unused import has_no_value

Objects = list[dict[str, Any]]
MAX_NESTING = 100


def tools_of(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """The column "tools" of a row; () without a value. Raises RowFault for another shape."""
    rule = (
        '"tools" is a list of JSON schemas of functions, {"name", "description", "parameters"}, or such a list as JSON.'
    )
    return tuple(_in_function(tool, where, rule) for tool in _objects(value, where, rule))


def calls_of(value: Any, where: str, *, rule: str) -> Objects:
    """The calls of a message; [] without a value. Raises RowFault for another shape, with this rule."""
    calls = []
    for call in _objects(value, where, rule):
        function = _in_function(call, where, rule)["function"]
        arguments = _parsed_json(function.get("arguments"))
        if arguments in (None, ""):
            arguments = {}
        if not isinstance(arguments, dict):
            raise wrong_type(where, rule, f"arguments of {shown_value(function['name'])}: {shown_value(arguments)}")
        _check_json(arguments, where, rule)
        written = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        identity = call.get("id")
        if not has_no_value(identity) and type(identity) not in (str, int):
            raise wrong_type(where, rule, f"the id {shown_value(identity)} of {shown_value(function['name'])}")
        calls.append(written if has_no_value(identity) else {**written, "id": str(identity)})
    return calls


def without_filled_nulls(fields: Mapping[str, Any], columns: Iterable[str]) -> dict[str, Any]:
    """The row without the nulls in its tools and calls. An Arrow column of objects has every key that any row has, null
    where a row lacks it: schemas and arguments would be full of keys that nobody wrote."""
    kept = dict(fields)
    if "tools" in kept:
        kept["tools"] = _without_nulls(kept["tools"])
    for column in columns:
        if isinstance(messages := kept.get(column), list):
            kept[column] = [
                {**m, "tool_calls": _without_nulls(m["tool_calls"])}
                if isinstance(m, dict) and m.get("tool_calls")
                else m
                for m in messages
            ]
    return kept


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _objects(value: Any, where: str, rule: str) -> Objects:
    if has_no_value(value):
        return []
    items = _parsed_json(value)
    items = [items] if isinstance(items, dict) else items
    if not isinstance(items, list):
        raise wrong_type(where, rule, shown_value(value))
    items = list(map(_parsed_json, items))
    for item in items:
        if not isinstance(item, dict):
            raise wrong_type(where, rule, f"a list with {shown_value(item)}")
    _check_json(items, where, rule)
    return items


def _check_json(value: Any, where: str, rule: str) -> None:
    """Raise RowFault for what cannot be written as JSON, or not be tokenised; a string of JSON may have hidden it."""
    depth, level = 0, [value]
    while level and depth <= MAX_NESTING:  # not by recursion, which ends at some thousand
        depth += 1
        inner = (item for one in level for item in (one.values() if isinstance(one, dict) else one))
        level = [item for item in inner if isinstance(item, dict | list)]
    if level:
        raise wrong_type(where, rule, f"objects in one another, {MAX_NESTING} deep and deeper")
    try:
        written = json.dumps(value)
    except (TypeError, ValueError) as error:  # dates, bytes and decimals of Arrow's
        raise wrong_type(where, rule, f"a value that JSON cannot hold: {error}") from None
    if lone_surrogate(written.encode()) >= 0:
        raise wrong_type(where, rule, "the escape of a lone surrogate, which no text can hold")


def _in_function(item: dict[str, Any], where: str, rule: str) -> dict[str, Any]:
    """{"type", "function": …}, also of a function that stands alone."""
    function = item.get("function", item)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        keys = shown_value(", ".join(item))
        raise wrong_type(where, rule, f'an object without a "name" of its function, with the keys {keys}')
    return item if "function" in item else {"type": "function", "function": function}


def _parsed_json(value: Any) -> Any:
    """What a string of JSON holds; other strings and values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value.strip()
