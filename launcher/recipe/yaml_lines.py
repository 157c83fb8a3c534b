"""YAML as plain data with line numbers: the parsed nodes are walked, no Python object is ever constructed from a tag.

A scalar keeps its raw text, because the schema knows what each field is: a revision 0123456 stays one, `off` stays a
word. Tags, aliases and repeated keys are refused: they could execute, expand or hide something.
"""

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from launcher.errors import RecipeError

KINDS = ("str", "int", "float", "bool", "null", "timestamp", "map", "seq")
PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in KINDS)
UNQUOTED = re.compile(r"[^\[\]{},:#\"'!&*|>%@`?-][^\[\]{},:#\"']*")  # text that needs no quotes, in a list either
QUOTE = "put text that holds any of : # [ ] { } & * ! % @ in quotes, and indent with blanks"
MAX_DEPTH = 20
MAX_BYTES = 2**19  # thousands of sources; takes seconds to parse
NULLS = frozenset(("", "~", "null", "Null", "NULL"))


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a recipe file, and the place (`file:line`) of each dotted key such as `data.sources[0].path`.

    Raises:
        RecipeError: unreadable, not UTF-8, broken, not a mapping, or more than plain data; one line, `file:line: ...`.
    """
    file = repr(str(path))[1:-1]
    try:
        text = _content(path, file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: a recipe is UTF-8 text; byte {error.start} is not; save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read ({error.strerror})") from None
    walk = _Walk(file)
    tree = walk.parse(text)
    if tree is not None and not isinstance(tree, dict):
        raise RecipeError(f"{walk.places['']}: a recipe is a mapping of sections, such as `train: {{steps: 100}}`")
    return tree or {}, walk.places


def _content(path: Path, file: str) -> bytes:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise RecipeError(f"{file}: a recipe is a file; this is none; write it into one")
    with path.open("rb") as opened:
        content = opened.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        size, first = path.stat().st_size, content.partition(b"\n")[0][:60]
        rule = f"{file}: a recipe has at most {MAX_BYTES:,} bytes"
        raise RecipeError(f"{rule}; got {size:,} and begins {first.decode(errors='replace')!r}; name a recipe")
    return content


def read_value(text: str) -> Any:
    """A value of the command line: a YAML list, mapping or quoted text, else the raw text; null and nothing are None.

    Raises:
        RecipeError: it starts like YAML and is not, or is tagged.
    """
    if not text.startswith(("[", "{", '"', "'", "!")):
        return None if text in NULLS else text
    try:
        return _Walk("value").parse(text)
    except RecipeError as error:
        raise RecipeError(str(error).partition(": ")[2].partition("; ")[0]) from None


def inline(value: Any) -> str:
    """A value on one line, as `read_value` reads it back."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    if not isinstance(value, str):
        return json.dumps(value).removesuffix(".0")
    if UNQUOTED.fullmatch(value) and value.isprintable() and value == value.strip() and value not in NULLS:
        return value
    return json.dumps(value, ensure_ascii=not value.isprintable())


def scalars(text: str) -> Iterator[tuple[str, int, int]]:
    """Each key and value of a YAML text that `read_file` takes, with the characters of the text where it stands."""
    nodes = [node] if (node := yaml.compose(text, Loader=yaml.SafeLoader)) else []
    while nodes:
        node = nodes.pop()
        if isinstance(node, ScalarNode):
            yield node.value, node.start_mark.index, node.end_mark.index
        else:
            nodes += chain.from_iterable(node.value) if isinstance(node, MappingNode) else node.value


class _Walk:
    """One pass over the nodes of a text."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[str, str] = {}
        self._seen: set[int] = set()

    def parse(self, text: str) -> Any:
        """The text as plain data, None if it holds nothing; `places` is filled on the way."""
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            problem = " ".join(filter(None, (error.context, error.problem)))
            place = f"{self.file}:{error.problem_mark.line + 1}"
            raise RecipeError(f"{place}: not valid YAML ({problem}); {QUOTE}") from None
        except yaml.YAMLError as error:
            raise RecipeError(f"{self.file}: not valid YAML ({' '.join(str(error).split())})") from None
        except RecursionError:
            raise RecipeError(f"{self.file}: not a recipe (nested too deeply)") from None
        return None if node is None else self._value(node, "")

    def _value(self, node: Node, path: str) -> Any:
        self.places.setdefault(path, self._place(node))
        if id(node) in self._seen:  # covers cycles and expansion bombs too
            raise self._error(node, "a value that an alias (*name) repeats is not allowed; write it out twice")
        self._seen.add(id(node))
        if path.count(".") + path.count("[") > MAX_DEPTH:
            raise self._error(node, "nested too deeply for a recipe")
        if node.tag not in PLAIN_TAGS:
            raise self._error(node, f"the tag {node.tag!r} is not allowed: a recipe is plain data; remove it")
        if isinstance(node, MappingNode):
            return dict(self._pairs(node, path))
        if isinstance(node, SequenceNode):
            return [self._value(item, f"{path}[{index}]") for index, item in enumerate(node.value)]
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
            self.places[dotted] = self._place(key)
            yield key.value, self._value(value, dotted)

    def _place(self, node: Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"

    def _error(self, node: Node, problem: str) -> RecipeError:
        return RecipeError(f"{self._place(node)}: {problem}")
