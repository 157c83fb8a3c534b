"""From a command line to a validated recipe: defaults < the recipe's file < `key=value`, all errors in one message.

The layers are plain dicts of dotted keys; pydantic validates what they merge to and fills in the defaults.
Nothing here imports torch: a wrong recipe is answered in a fraction of a second.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import ValidationError

from launcher.errors import RecipeError
from launcher.recipe.command_line import bare, closest, parse, shown
from launcher.recipe.field_types import recipe_names, recipes_dir
from launcher.recipe.fields import LEAVES, SECTIONS, accepts, assignment, unknown
from launcher.recipe.schema import Recipe
from launcher.recipe.yaml_lines import read_file

MAX_LINES = 5  # of a message
Origin = Literal["default", "file", "command line"]
Values = dict[str, Any]  # by dotted key


@dataclass(frozen=True)
class Resolved:
    """A command line understood: the recipe to run, and where each of its values comes from."""

    recipe: Recipe
    name: str  # the recipe's name; of the user's own file, the file's name without .yaml
    path: Path  # the recipe's file
    mode: str  # "train", "parity", "bench", "preview" or "show"
    origins: dict[str, Origin]  # by dotted key, every key of the recipe
    report: Path | None  # where else the report is to be written (report=PATH)
    blocks: int  # how many mode=preview prints (blocks=N)


def resolve(argv: Sequence[str]) -> Resolved:
    """Resolve `recipe=NAME key=value ...`.

    Raises:
        RecipeError: anything is wrong with the command line or the recipe; the message names all of it in at most five
            lines of rule, value and remedy.
    """
    arguments = parse(argv)
    options, problems = arguments.options, arguments.problems
    try:
        path = _recipe_path(options["recipe"])
        tree, places = read_file(path)
    except RecipeError as error:
        problems[str(error)] = "recipe"
        # The file may have set the end of training: a missing one is not the command line's fault.
        path, tree, places = Path(), {"train.epochs": 1}, {}
    from_file = _layer(_flat(tree), path.absolute().parent, problems)
    overrides = (pair for key, value in arguments.overrides for pair in _flat({key: value}))
    from_line = _layer(overrides, Path.cwd(), problems)
    try:
        recipe = Recipe.model_validate(_nested(from_file | from_line))
    except ValidationError as error:
        problems |= _problems(error, places, from_line)
    if problems:
        _refuse(problems)
    origins: dict[str, Origin] = dict.fromkeys(LEAVES, "default")
    return Resolved(
        recipe=recipe,
        name=path.stem,
        path=path.absolute(),
        mode=options["mode"],
        origins=origins | dict.fromkeys(from_file, "file") | dict.fromkeys(from_line, "command line"),
        report=Path(options["report"]).absolute() if options["report"] else None,
        blocks=int(options["blocks"]),
    )


def _recipe_path(recipe: str) -> Path:
    names = recipe_names()
    listed = f"the recipes are {', '.join(names)}, or a path that ends in .yaml"
    near = closest(recipe.removesuffix(".yaml"), names)
    hint = f"did you mean recipe={near}? " if near else ""
    if not recipe:
        raise RecipeError(f"recipe=NAME is required; got none; {listed}")
    if recipe.endswith(".yaml"):
        path = Path(recipe).expanduser()
        if not path.exists():
            raise RecipeError(f"recipe must be a file if it ends in .yaml; {recipe!r} does not exist; {hint or listed}")
        return path
    if recipe not in names:
        raise RecipeError(f"recipe must exist; got {shown(recipe)}; {hint}{listed}")
    return recipes_dir() / f"{recipe}.yaml"


def _flat(tree: Values, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; a section left empty gives none."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in SECTIONS and isinstance(value, dict):
            yield from _flat(value, f"{key}.")
        elif key not in SECTIONS or value is not None:
            yield key, value


def _layer(pairs: Iterable[tuple[str, Any]], folder: Path, problems: dict[str, str]) -> Values:
    """What one place sets, its relative paths starting from `folder`; keys that it sets twice go to `problems`."""
    values: Values = {}
    for key, value in pairs:
        if key in values:
            got = f"got {shown(values[key])} and {shown(value)}"
            problems[f"{bare(key)} is given twice; {got}; remove one"] = bare(key)
        else:
            values[key] = _from_folder(value, folder)
    return values


def _from_folder(value: Any, folder: Path) -> Any:
    """Texts that begin with ./ or ../ become paths from `folder`, ~/ from the home folder; the rest stays as it is."""
    if isinstance(value, dict):
        return {key: _from_folder(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_folder(item, folder) for item in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return os.path.normpath(folder / value)
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _nested(values: Values) -> Values:
    """The tree that pydantic validates. It keeps unknown keys, and what is no section in a section's place."""
    tree: Values = {section: {} for section in SECTIONS}
    for key in sorted(values, key=SECTIONS.__contains__):  # sections last: they replace their keys
        section, _, name = key.partition(".")
        if section in SECTIONS and name:
            tree[section][name] = values[key]
        else:
            tree[key] = values[key]
    return tree


def _problems(error: ValidationError, places: dict[str, str], from_line: Values) -> dict[str, str]:
    """One problem a key, though pydantic reports every branch of a union. `places` are the file's, by dotted key."""
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        key, leaf = _keys(detail["loc"])
        place = "command line" if leaf in from_line else places.get(key) or places.get(leaf)
        got = f"got {'nothing' if detail['type'] == 'missing' else shown(detail['input'])} ({place})"
        if detail["type"] == "value_error":  # a rule between keys
            text = str(detail["ctx"]["error"])
        elif detail["type"] == "extra_forbidden":
            text = unknown(key, got)
        elif key in SECTIONS:
            first = next(leaf for leaf in LEAVES if leaf.startswith(f"{key}."))
            text = f"{key} is a section; {got}; try {assignment(first)}"
        else:
            text = f"{key} must be {accepts(key)}; {got}; try {assignment(leaf)}"
        problems.setdefault(key, text)
    return {text: bare(key) for key, text in problems.items()}


def _keys(location: tuple[int | str, ...]) -> tuple[str, str]:
    """`data.sources[0].path` and `data.sources` from a location of pydantic's. The branch of a union is left out."""
    leaf = ".".join(map(str, location[:2]))
    if len(location) > 2 and isinstance(location[2], int):
        return f"{leaf}[{location[2]}]" + "".join(f".{name}" for name in location[3:4]), leaf
    return leaf, leaf


def _refuse(problems: dict[str, str]) -> NoReturn:
    lines = list(problems)
    if len(lines) > MAX_LINES:
        rest = lines[MAX_LINES - 1 :]
        keys = dict.fromkeys(problems[line] for line in rest)
        lines[MAX_LINES - 1 :] = [f"and {len(rest)} more, in {', '.join(keys)}"]
    raise RecipeError("\n".join(lines))
