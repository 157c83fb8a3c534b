"""What one place gives to a recipe: its file, or the command line. Known keys pass, everything else is answered here.

Interpolation, `_target_` and unknown keys are refused in each layer by itself, before anything is merged.
"""

import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launcher.recipe import fields
from launcher.recipe.command_line import Problem, bare, shown
from launcher.recipe.yaml_lines import inline

Origin = Literal["default", "file", "command line"]


@dataclass
class Layer:
    """What one place gives: known keys alone. Everything refused on the way is in `problems`."""

    origin: Origin
    folder: Path  # what ./ and ../ are relative to
    where: str = "command line"  # how errors name it
    lines: dict[str, int] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def at(self, key: str) -> str:
        return f"{self.where}:{self.lines[key]}" if key in self.lines else self.where

    def take(self, pairs: Iterable[tuple[str, Any]]) -> None:
        """Sort dotted keys and their values into what is known and what is refused."""
        for key, value in pairs:
            text = _refusal(key, value, at=self.at(key))
            if text is None and key in self.values:
                text = f"{key} is given twice; got {shown(self.values[key])} and {shown(value)}; remove one"
            if text is None:
                self.values[key] = _located(value, self.folder)
            else:
                self.problems.append(Problem(bare(key), text))


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a section left empty gives none."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in fields.SECTIONS and isinstance(value, dict):
            yield from flat(value, f"{key}.")
        elif key not in fields.SECTIONS or value is not None:
            yield key, value


def _located(value: Any, folder: Path) -> Any:
    """Texts that begin with ./ or ../ become paths from `folder`, ~/ from the home folder; the rest is left alone."""
    if isinstance(value, dict):
        return {key: _located(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_located(item, folder) for item in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return os.path.normpath(folder / value)
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _refusal(key: str, value: Any, *, at: str) -> str | None:
    """Why a layer may not give this key, if so."""
    if rule := _executable(key) or _executable(value):
        return f"{bare(key)}: {rule}; got {shown(value)} ({at}); write the value itself"
    got = f"got {shown(value)} ({at})"
    if key in fields.LEAVES:
        return None
    if key in fields.SECTIONS:
        first = next(leaf for leaf in fields.LEAVES if leaf.startswith(f"{key}."))
        return f"{key} is a section; {got}; try {assignment(first)}"
    return unknown(key, got)


def _executable(value: Any) -> str | None:
    """The rule that a key or value breaks by asking to be resolved or called, wherever in it."""
    if isinstance(value, dict):
        return next(filter(None, (_executable(item) for pair in value.items() for item in pair)), None)
    if isinstance(value, list):
        return next(filter(None, map(_executable, value)), None)
    if not isinstance(value, str):
        return None
    if "${" in value:
        return "interpolation is not allowed"
    if value.rsplit(".", 1)[-1] == "_target_":
        return "_target_ is not allowed, a recipe is data"
    return "??? is not a value" if value.strip("\\") == "???" else None


def unknown(key: str, got: str) -> str:
    """The answer to a key that does not exist: the one that was meant and what it takes, else what there is."""
    meant = fields.nearest(key)
    if meant is None:
        remedy = fields.siblings(key)
    else:
        remedy = f"did you mean {meant}{'' if meant in fields.SECTIONS else f' ({fields.accepts(meant)})'}?"
    return f"unknown key {bare(key)}; {got}; {remedy}"


def assignment(key: str) -> str:
    """A `key=value` that is accepted, quoted for the shell."""
    return shlex.quote(f"{key}={inline(fields.example(key))}")
