"""From a command line to a validated recipe: defaults < the recipe's file < `key=value`, all errors in one message.

The layers are plain dicts of dotted keys; pydantic validates what they merge to and fills in the defaults.
Nothing here imports torch: a wrong recipe is answered in a fraction of a second.
"""

import os.path
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import ValidationError

from launcher.errors import RecipeError
from launcher.recipe.command_line import MAX_LINES, bare, echoed, nearest_recipe, parse
from launcher.recipe.field_types import recipe_names, recipes_dir
from launcher.recipe.fields import LEAVES, SECTIONS, accepts, as_list, assignment, example, unknown
from launcher.recipe.paths import Values, from_folder, misplaced
from launcher.recipe.schema import ALTERNATIVES, Recipe
from launcher.recipe.yaml_lines import read_file

MAX_KEYS_NAMED = 20  # of those that have no line of their own
Origin = Literal["default", "file", "command line"]


@dataclass(frozen=True)
class Resolved:
    """A command line understood: the recipe to run, and where each of its values comes from."""

    recipe: Recipe
    name: str  # the recipe's name; of the user's own file, the file's name without .yaml
    path: Path  # the recipe's file
    mode: str  # "train", "check", "parity", "bench", "preview" or "show"
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
        path = recipe_path(options["recipe"])
        tree, places = read_file(path)
    except RecipeError as error:
        problems[str(error)] = "recipe"
        # The file may have set the end of training: a missing one is not the command line's fault.
        path, tree, places = Path(), {"train.epochs": 1}, {}
    folder = path.absolute().parent
    from_file = _layer(_flat(tree), problems, folder)
    from_line = _layer(
        (pair for key, value in arguments.overrides for pair in _flat({key: value})), problems, Path.cwd()
    )
    _drop_overruled(from_file, from_line)
    values = from_folder(from_file, folder) | from_folder(from_line, Path.cwd())
    try:
        recipe = Recipe.model_validate(_nested(values))
    except ValidationError as error:
        problems |= _problems(error, places, from_file, from_line)
    used = {key: value for key, value in from_file.items() if key not in from_line}
    for key, problem in (*misplaced(used, folder, folder), *misplaced(from_line, Path.cwd(), folder)):
        problems.setdefault(problem, key)
    if problems:
        refuse(problems)
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


def recipe_path(recipe: str, key: str = "recipe") -> Path:
    """The file of `key=recipe`: of a shipped recipe, or the user's own. Raises RecipeError where there is none."""
    names = recipe_names()
    listed = f"the recipes are {', '.join(names)}, or a path that ends in .yaml"
    near = nearest_recipe(recipe)
    hint = f"did you mean {key}={bare(near)}? " if near else ""
    if not recipe:
        raise RecipeError(f"{key}=NAME is required; got none; {listed}")
    if recipe.endswith(".yaml"):
        path = Path(os.path.expanduser(recipe))
        if not os.path.exists(path):
            rule = f"{key} must be a file if it ends in .yaml"
            raise RecipeError(f"{rule}; {echoed(recipe)} does not exist; {hint.strip() or listed}")
        return path
    if recipe not in names and os.path.isfile(recipe):
        raise RecipeError(f"a recipe's file must end in .yaml; got {echoed(recipe)}; rename it")
    if recipe not in names:
        raise RecipeError(f"{key} must exist; got {echoed(recipe)}; {hint}{listed}")
    return recipes_dir() / f"{recipe}.yaml"


def _flat(tree: Values, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; a section left empty gives none."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in SECTIONS and isinstance(value, dict):
            yield from _flat(value, f"{key}.")
        elif key not in SECTIONS or value is not None:
            yield key, value


def _layer(pairs: Iterable[tuple[str, Any]], problems: dict[str, str], folder: Path) -> Values:
    """What one place sets, whose ./ is `folder`; keys that it sets twice go to `problems`."""
    values: Values = {}
    for key, value in pairs:
        if key in values:
            got = f"got {echoed(values[key], key)} and {echoed(value, key)}"
            problems[f"{bare(key)} is given twice; {got}; remove one"] = key
        else:
            one_path = key == "data.sources" and isinstance(value, str) and os.path.exists(from_folder(value, folder))
            values[key] = as_list(key, [value] if one_path else value) if key in LEAVES else value
    return values


def _drop_overruled(from_file: Values, from_line: Values) -> None:
    """A key on the command line displaces the file's other key for the same thing. Both in one place stay: an error."""
    for pair in ALTERNATIVES:
        for key, other in (pair, pair[::-1]):
            if from_line.get(key) is not None and from_file.get(key) is None:
                from_file.pop(other, None)


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


def _problems(error: ValidationError, places: dict[str, str], from_file: Values, from_line: Values) -> dict[str, str]:
    """One problem a key, though pydantic reports every branch of a union. `places` are the file's, by dotted key."""
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        key, leaf = _keys(detail["loc"])
        if len(problems) >= MAX_LINES:  # has no line: looking for its nearest key may take longer than all else
            problems.setdefault(key, key)
            continue
        place = "command line" if leaf in from_line else places.get(key) or places.get(leaf)
        given = (from_file | from_line).get(key, detail["input"])  # as written, paths too
        got = f"got {'nothing' if detail['type'] == 'missing' else echoed(given, key)} ({place})"
        if detail["type"] == "value_error":  # a rule between keys
            text = str(detail["ctx"]["error"])
        elif detail["type"] == "extra_forbidden":
            text = unknown(key, given, got)
        elif key in SECTIONS:
            text = f"{key} is a section; {got}; try {_within_section(key, given)}"
        else:
            text = f"{key} must be {accepts(key)}; {got}; try {assignment(leaf, example(leaf))}"
        problems.setdefault(key, text)
    return {text: key for key, text in problems.items()}


def _within_section(section: str, value: Any) -> str:
    """The assignment that a value for a whole section most likely meant: to the first key that takes it."""
    leaves = [leaf for leaf in LEAVES if leaf.startswith(f"{section}.")]
    for leaf in leaves:
        try:
            Recipe.model_validate(_nested({leaf: as_list(leaf, value)}))
        except ValidationError as error:
            if any(_keys(detail["loc"])[1] == leaf for detail in error.errors(include_url=False)):
                continue
        return assignment(leaf, value)
    return assignment(leaves[0], example(leaves[0]))


def _keys(location: tuple[int | str, ...]) -> tuple[str, str]:
    """`data.sources[0].path` and `data.sources` from a location of pydantic's. The branch of a union is left out."""
    leaf = ".".join(map(str, location[:2]))
    if len(location) > 2 and isinstance(location[2], int):
        return f"{leaf}[{location[2]}]" + "".join(f".{name}" for name in location[3:4]), leaf
    return leaf, leaf


def refuse(problems: dict[str, str]) -> NoReturn:
    """Raise RecipeError with all problems (message -> the key that it is about), in at most MAX_LINES lines."""
    lines = list(problems)
    if len(lines) > MAX_LINES:
        rest = lines[MAX_LINES - 1 :]
        keys = list(dict.fromkeys(problems[line] for line in rest))
        more = ", ..." if len(keys) > MAX_KEYS_NAMED else ""
        lines[MAX_LINES - 1 :] = [f"and {len(rest):,} more, in {', '.join(map(bare, keys[:MAX_KEYS_NAMED]))}{more}"]
    raise RecipeError("\n".join(lines))
