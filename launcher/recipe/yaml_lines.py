"""YAML as plain data: the node tree is walked, nothing is ever constructed.

Scalars keep their raw text (the schema knows what each field is: a revision 0123456 stays one, `off` stays a word),
keys know their line, and what YAML could execute, expand or hide (tags, aliases, repeated keys) is refused.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

KINDS = ("str", "int", "float", "bool", "null", "timestamp", "map", "seq")
PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in KINDS)
PLAIN = re.compile(r"[^\[\]{},:#\"'!&*|>%@`?-][^\[\]{},:#\"']*")  # text that needs no quotes, in a list either
MAX_DEPTH = 20
NULLS = frozenset(("", "~", "null", "Null", "NULL"))


class YamlError(ValueError):
    """Text that is no plain YAML; the message is one line that starts with `file:line`."""


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a recipe file, and the line of each key by dotted path (`data.sources[0].path`).

    Raises:
        YamlError: unreadable, not UTF-8, broken, not a mapping, or more than plain data.
    """
    where = repr(str(path))[1:-1]
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlError(f"{where}: a recipe is UTF-8 text; byte {error.start} is not; save it as UTF-8") from None
    except OSError as error:
        raise YamlError(f"{where}: cannot be read ({error.strerror})") from None
    node = _compose(text, where)
    if node is None:
        return {}, {}
    if not isinstance(node, MappingNode):
        raise YamlError(f"{where}:{_line(node)}: a recipe is a mapping of sections, such as `train: {{steps: 100}}`")
    walk = _Walk(where)
    return walk.value(node, ""), walk.lines


def read_value(text: str) -> Any:
    """A value of the command line: a YAML list, mapping or quoted text, else the raw text; null and nothing are None.

    Raises:
        YamlError: it starts like YAML and is not, or is tagged.
    """
    if not text.startswith(("[", "{", '"', "'", "!")):
        return None if text in NULLS else text
    node = _compose(text, "value")
    return _Walk("value").value(node, "") if node is not None else None


def inline(value: Any) -> str:
    """A value on one line, as `read_value` reads it back."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return _quoted(value) if isinstance(value, str) else str(value)


def _quoted(text: str) -> str:
    if PLAIN.fullmatch(text) and text.isprintable() and text == text.strip() and text not in NULLS:
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _compose(text: str, where: str) -> Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{where}:{mark.line + 1}" if mark else where
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise YamlError(f"{at}: not valid YAML ({problem})") from None
    except yaml.YAMLError as error:
        raise YamlError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise YamlError(f"{where}: not a recipe (nested too deeply)") from None


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


class _Walk:
    """One pass over a node tree. An aliased node is met twice: that finds aliases, cycles and expansion bombs alike."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.lines: dict[str, int] = {}
        self._seen: set[int] = set()

    def value(self, node: Node, path: str) -> Any:
        if path:
            self.lines.setdefault(path, _line(node))
        if id(node) in self._seen:
            raise self._error(node, "a value that an alias (*name) repeats is not allowed; write it out twice")
        self._seen.add(id(node))
        if path.count(".") + path.count("[") > MAX_DEPTH:
            raise self._error(node, "nested too deeply for a recipe")
        if node.tag not in PLAIN_TAGS:
            raise self._error(node, f"the tag {node.tag!r} is not allowed: a recipe is plain data; remove it")
        if isinstance(node, MappingNode):
            return dict(self._pairs(node, path))
        if isinstance(node, SequenceNode):
            return [self.value(item, f"{path}[{index}]") for index, item in enumerate(node.value)]
        return None if not node.style and node.value in NULLS else node.value

    def _pairs(self, node: MappingNode, path: str) -> Iterator[tuple[str, Any]]:
        names: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, ScalarNode) or key.tag not in PLAIN_TAGS:
                raise self._error(key, "a key is plain text")
            if key.value in names:
                raise self._error(key, f"the key {key.value!r} is given twice; remove one")
            names.add(key.value)
            dotted = f"{path}.{key.value}" if path else key.value
            self.lines[dotted] = _line(key)
            yield key.value, self.value(value, dotted)

    def _error(self, node: Node, problem: str) -> YamlError:
        return YamlError(f"{self.where}:{_line(node)}: {problem}")
