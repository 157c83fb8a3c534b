"""The command line: `recipe=NAME key=value ...`, split and checked for form. load.py checks what the keys mean."""

import difflib
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.credentials import masked_tree, shortened
from launcher.errors import RecipeError
from launcher.recipe.field_types import recipe_names
from launcher.recipe.yaml_lines import inline, read_value

MODES = {
    "train": "fine-tune (the default)",
    "check": "check what a run needs: device, tools, packages, disk, memory, model, data; writes no run folder",
    "parity": "compare losses and gradients with stock eager code and with fp32; updates nothing, writes no run folder",
    "bench": "measure the step beside that of stock eager code: speed, memory, start; writes no run folder",
    "preview": "print what would be trained on, token by token; needs no GPU, writes no run folder",
    "generate": "answer prompts with the adapter of run=FOLDER, or talk to it in the terminal",
    "export": "write the model of run=FOLDER to a folder that stock code loads, and prove that it is the trained one",
    "push": "put the adapter of run=FOLDER, or an exported folder, with its model card on the hub",
    "evaluate": "loss, perplexity and token accuracy of the adapter of run=FOLDER, on any data",
    "report": "print the report of run=FOLDER again, or what there is of an unfinished run; html=PATH writes a page",
    "compare": "print how the finished runs of runs=[FOLDER, ...] differ: recipes, losses, speed, memory, verdicts",
    "show": "print the resolved recipe and where each value comes from",
    "schema": "print the JSON schema of a recipe",
    "keys": "print the table of keys in docs/keys.md",
}
OPTIONS = {"recipe": "", "mode": "train", "report": "", "blocks": "2"}  # the keys outside every section, their defaults
WITHOUT_REPORT = ("preview", "generate", "report")
MAX_LINES = 5  # of a message


@dataclass
class Arguments:
    """A split command line. Errors of form are in `problems`; the rest is kept, so that it can be checked as well."""

    options: dict[str, str] = field(default_factory=OPTIONS.copy)  # as written, else the default
    overrides: list[tuple[str, Any]] = field(default_factory=list)  # key as written, value as plain data
    problems: dict[str, str] = field(default_factory=dict)  # rule, value and remedy on one line -> the key as written

    def refuse(self, key: str, problem: str) -> None:
        self.problems[problem] = key


def echoed(value: Any, key: str = "") -> str:
    """A value as an error quotes it: on one line, control characters escaped, credentials masked, cut at 60 characters.
    `key`: what it was given to."""
    text = "null" if value is None else repr(masked_tree(value, key))
    return shortened(text, 60) if len(text) <= 60 else shortened(text, 56) + " ..."


def bare(key: str) -> str:
    """A key as an error names it: like a value, without the quotes."""
    return echoed(key)[1:-1]


def closest(word: str, names: Iterable[str], likeness: float = 0.6) -> str | None:
    """The name that is spelled most like `word`, if one is at least this much alike (1: equal)."""
    return next(iter(difflib.get_close_matches(word, list(names), n=1, cutoff=likeness)), None)


def nearest_recipe(word: str) -> str | None:
    """What `recipe=word` was most likely to be: a file of the user's own, else a shipped recipe."""
    own = Path(word)
    if os.path.isfile(f"{word}.yaml"):
        return f"{word}.yaml"
    if own.suffix == ".yaml" and (near := closest(own.name, [path.name for path in own.parent.glob("*.yaml")])):
        return str(own.with_name(near))
    return closest(word.removesuffix(".yaml"), recipe_names())


def parse(argv: Sequence[str], *, own_options: Iterable[str] = ()) -> Arguments:
    """Split a command line. `own_options`: keys that a mode has besides OPTIONS; their values stay text."""
    names = (*OPTIONS, *own_options)
    arguments, given = Arguments(), dict[str, str]()
    for argument in argv:
        key, equals, text = argument.partition("=")
        key = key.strip()
        if argument.startswith("--") and not equals and (near := closest(key[2:], (*names, "help", "version"))):
            remedy = f"write {near}=..." if near in names else f"did you mean --{near}?"
            arguments.refuse(argument, f"every argument is key=value; got {echoed(argument)}; {remedy}")
        elif not (equals and key) and len(arguments.problems) >= MAX_LINES:
            arguments.refuse(argument, argument)  # counted only
        elif not equals or not key:
            recipe = argument if argument.endswith(".yaml") else nearest_recipe(argument)
            remedy = f"did you mean recipe={bare(recipe)}?" if recipe else "try train.steps=100, or --help alone"
            arguments.refuse(argument, f"every argument is key=value; got {echoed(argument)}; {remedy}")
        elif key not in names:
            _override(arguments, key, text)
        elif key in given:
            arguments.refuse(key, f"{key} is given twice; got {echoed(given[key])} and {echoed(text)}; remove one")
        else:
            given[key] = text
    arguments.options |= given
    _check_options(arguments, given)
    return arguments


def _override(arguments: Arguments, key: str, text: str) -> None:
    try:
        arguments.overrides.append((key, read_value(text)))
    except RecipeError as error:
        arguments.refuse(key, f"{bare(key)}: {error}; got {echoed(text, key)}; {_quoted(key, text)}")


def _quoted(key: str, text: str) -> str:
    """The remedy for a value that YAML cannot read."""
    if text[0] + text[-1:] in ("[]", "{}"):
        return """quote the text in it that holds any of : , # [ ] { } & * ! % @, as in '[{path: "a: b"}]'"""
    quoted = f"quote it: {shlex.quote(f'{bare(key)}={inline(shortened(text, 60))}')}"
    if text[0] not in "[{" or _closes(text):
        return quoted
    rule = "a bracket or brace is not closed; close it, and put the argument in single quotes"
    return rule if text.startswith("[{") else f"{rule}; where it is text, {quoted}"


def _closes(text: str) -> bool:
    """Whether as many brackets and braces are closed as opened."""
    return sum(map(text.count, "[{")) <= sum(map(text.count, "]}"))


def _check_options(arguments: Arguments, given: dict[str, str]) -> None:
    mode, report, blocks = arguments.options["mode"], given.get("report"), given.get("blocks")
    if mode not in MODES:
        remedy = f"try mode={closest(mode, MODES) or 'show'}"
        arguments.refuse("mode", f"mode must be one of {', '.join(MODES)}; got {echoed(mode)}; {remedy}")
    if report == "":
        arguments.refuse("report", "report must be a path; got nothing; try report=./report.json")
    elif report and mode in WITHOUT_REPORT:
        arguments.refuse("report", f"mode={mode} writes no report; got report={bare(report)}; remove it")
    if blocks is not None and mode != "preview":
        got = f"got {echoed(blocks)} with mode={bare(mode)}"
        arguments.refuse("blocks", f"blocks belongs to mode=preview; {got}; remove it")
    elif blocks is not None and not re.fullmatch("[0-9]{1,9}", blocks):
        rule = "blocks must be a whole number >= 0"
        arguments.refuse("blocks", f"{rule}; got {echoed(blocks)}; try blocks={OPTIONS['blocks']}")
