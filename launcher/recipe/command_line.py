"""The command line: `recipe=NAME key=value ...`, split and checked for form. What the keys mean is load.py's matter."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from launcher.recipe.yaml_lines import YamlError, read_value

MODES = {
    "train": "fine-tune (the default)",
    "parity": "compare losses and gradients with stock eager code and with fp32; updates nothing, writes no run folder",
    "bench": "measure the step beside that of stock eager code: speed, memory, start; writes no run folder",
    "preview": "print what would be trained on, token by token; needs no GPU, writes no run folder",
    "show": "print the resolved recipe and where each value comes from",
    "schema": "print the JSON schema of a recipe",
}
BESIDE = ("recipe", "mode", "report", "blocks")  # the keys that stand beside the sections
PREVIEW_BLOCKS = 2  # printed by mode=preview


class Problem(NamedTuple):
    """One thing that is wrong, for the user: rule, value and remedy on one line."""

    key: str
    text: str


@dataclass
class Arguments:
    """A command line, split. Whatever is wrong with its form is in `problems`, and the rest goes on to be checked."""

    recipe: str = ""
    mode: str = "train"
    report: str = ""
    blocks: int = PREVIEW_BLOCKS
    overrides: list[tuple[str, Any]] = field(default_factory=list)  # key as written, value as plain data
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, key: str, text: str) -> None:
        self.problems.append(Problem(key, text))


def shown(value: Any) -> str:
    """A value as an error quotes it: on one line, control characters escaped, cut at 60 characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:56] + " ..."


def bare(key: str) -> str:
    """A key as an error names it: like a value, without the quotes."""
    return shown(key)[1:-1]


def closest(word: str, names: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, names, n=1)), None)


def parse(argv: Sequence[str], *, recipes: Sequence[str]) -> Arguments:
    """Split a command line; `recipes` are the names that a forgotten `recipe=` may have meant."""
    found = Arguments()
    given: dict[str, str] = {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        key = key.strip()
        if not equals or not key:
            found.refuse(
                bare(argument), f"every argument is key=value; got {shown(argument)}; {_meant(argument, recipes)}"
            )
        elif "${" in argument:
            found.refuse(
                bare(key), f"{bare(key)}: interpolation is not allowed; got {shown(text)}; write the value itself"
            )
        elif key in given and key in BESIDE:
            found.refuse(key, f"{key} is given twice; got {shown(given[key])} and {shown(text)}; remove one")
        elif key not in BESIDE:
            _override(found, key, text)
        given.setdefault(key, text)
    found.recipe = given.get("recipe", "")
    _beside(found, mode=given.get("mode", "train"), report=given.get("report"), blocks=given.get("blocks"))
    return found


def _override(found: Arguments, key: str, text: str) -> None:
    try:
        found.overrides.append((key, read_value(text)))
    except YamlError as error:
        found.refuse(bare(key), f"{bare(key)}: {error}; got {shown(text)}; write plain text, [a, b] or {{key: value}}")


def _beside(found: Arguments, *, mode: str, report: str | None, blocks: str | None) -> None:
    if mode in MODES:
        found.mode = mode
    else:
        meant = closest(mode, list(MODES)) or "show"
        found.refuse("mode", f"mode must be one of {', '.join(MODES)}; got {shown(mode)}; try mode={meant}")
    if report == "":
        found.refuse("report", "report must be a path; got nothing; try report=./report.json")
    elif report and mode == "preview":
        rule = "report is written by mode=train, mode=parity and mode=bench"
        found.refuse("report", f"{rule}; got {shown(report)} with mode=preview; remove one")
    found.report = report or ""
    if blocks is None:
        return
    if mode != "preview":
        found.refuse("blocks", f"blocks belongs to mode=preview; got {shown(blocks)} with mode={bare(mode)}; remove it")
    elif not re.fullmatch("[0-9]{1,9}", blocks):
        rule = "blocks must be a whole number >= 0"
        found.refuse("blocks", f"{rule}; got {shown(blocks)}; try blocks={PREVIEW_BLOCKS}")
    else:
        found.blocks = int(blocks)


def _meant(argument: str, recipes: Sequence[str]) -> str:
    recipe = argument if argument.endswith(".yaml") else closest(argument, recipes)
    return f"did you mean recipe={bare(recipe)}?" if recipe else "try train.steps=100, or --help alone"
