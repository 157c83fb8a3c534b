"""From a command line to a validated recipe: defaults < the recipe's file < `key=value`, all errors reported together.

OmegaConf merges the layers, pydantic validates the whole.
Nothing here imports torch: a wrong recipe is answered in a fraction of a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf
from pydantic import ValidationError

from launcher.errors import RecipeError
from launcher.recipe import fields
from launcher.recipe.command_line import Problem, closest, parse, shown
from launcher.recipe.field_types import RULE, recipes_dir
from launcher.recipe.layers import Layer, Origin, assignment, flat, unknown
from launcher.recipe.schema import Recipe
from launcher.recipe.yaml_lines import YamlError, read_file

MAX_LINES = 5  # of a message


@dataclass(frozen=True)
class Resolved:
    """A command line understood: the recipe to run, and where each of its values came from."""

    recipe: Recipe
    name: str  # the recipe's name; of the user's own file, the file's name without .yaml
    path: Path  # the recipe's file
    mode: str  # "train", "parity", "bench", "preview" or "show"
    origins: dict[str, Origin]  # by dotted key, every key of the recipe
    report: Path | None  # where else the report is to be written (report=PATH)
    blocks: int  # how many mode=preview prints (blocks=N)


def recipe_names() -> list[str]:
    """The names of the shipped recipes.

    Raises:
        RecipeError: the installation lacks them.
    """
    try:
        return sorted(path.stem for path in recipes_dir().glob("*.yaml"))
    except FileNotFoundError as error:
        raise RecipeError(str(error)) from None


def resolve(argv: Sequence[str]) -> Resolved:
    """Resolve `recipe=NAME key=value ...`.

    Raises:
        RecipeError: anything is wrong with the command line or the recipe; the message names all of it in at most five
            lines of rule, value and remedy.
    """
    names = recipe_names()
    arguments = parse(argv, recipes=names)
    problems = list(arguments.problems)
    file = Layer("file", Path.cwd())
    try:
        path = _find(arguments.recipe, names)
        file = _read(path)
    except (RecipeError, YamlError) as error:
        path = None
        problems.append(Problem("recipe", str(error)))
    line = Layer("command line", Path.cwd())
    line.take(pair for key, value in arguments.overrides for pair in flat({key: value}))
    recipe, wrong = _validate((file, line))
    if path is None:  # what only the file could have set is not the command line's fault
        wrong = [problem for problem in wrong if problem.key != "train.epochs" or "train.epochs" in line.values]
    problems += file.problems + line.problems + wrong
    if problems or recipe is None or path is None:
        _refuse(problems)
    return Resolved(
        recipe=recipe,
        name=path.stem,
        path=path.absolute(),
        mode=arguments.mode,
        origins={key: _origin(key, (line, file)) for key in fields.LEAVES},
        report=Path(arguments.report).absolute() if arguments.report else None,
        blocks=arguments.blocks,
    )


def _refuse(problems: list[Problem]) -> NoReturn:
    lines = list(dict.fromkeys(problem.text for problem in problems))
    if len(lines) > MAX_LINES:
        rest = dict.fromkeys(problem.key for problem in problems if problem.text in lines[MAX_LINES - 1 :])
        lines[MAX_LINES - 1 :] = [f"and {len(lines) - MAX_LINES + 1} more, in {', '.join(rest)}"]
    raise RecipeError("\n".join(lines))


def _find(recipe: str, names: list[str]) -> Path:
    listed = f"the recipes are {', '.join(names)}, or a path that ends in .yaml"
    meant = closest(recipe.removesuffix(".yaml"), names)
    hint = f"did you mean recipe={meant}? " if meant else ""
    if not recipe:
        raise RecipeError(f"recipe=NAME is required; got none; {listed}")
    if recipe.endswith(".yaml"):
        path = Path(recipe).expanduser()
        if not path.exists():
            raise RecipeError(f"recipe must be a file if it ends in .yaml; {recipe!r} does not exist; {hint or listed}")
        return path
    if "/" in recipe or "\\" in recipe:
        raise RecipeError(f"recipe must be a name, or a path that ends in .yaml; got {shown(recipe)}; {listed}")
    if recipe not in names:
        raise RecipeError(f"recipe must exist; got {shown(recipe)}; {hint}{listed}")
    return recipes_dir() / f"{recipe}.yaml"


def _read(path: Path) -> Layer:
    tree, lines = read_file(path)
    layer = Layer("file", path.absolute().parent, where=repr(str(path))[1:-1], lines=lines)
    layer.take(flat(tree))
    return layer


def _merge(layers: Sequence[Layer]) -> Any:
    """The defaults with each layer over them, as plain data; lists are replaced."""
    defaults = {name: fields.section_of(name).model_construct().model_dump() for name in fields.SECTIONS}
    merged = OmegaConf.create(defaults)
    for layer in layers:
        for key, value in layer.values.items():
            OmegaConf.update(merged, key, value, merge=False)
    return OmegaConf.to_container(merged, resolve=False)


def _validate(layers: Sequence[Layer]) -> tuple[Recipe | None, list[Problem]]:
    try:
        return Recipe.model_validate(_merge(layers)), []
    except ValidationError as error:
        found: dict[str, Problem] = {}  # one for each key: a union reports each of its branches
        for detail in error.errors(include_url=False):
            key = _key(detail["loc"])
            leaf = ".".join(key.split("[")[0].split(".")[:2])
            layer = next((layer for layer in reversed(layers) if leaf in layer.values), None)
            at = layer.at(key if key in layer.lines else leaf) if layer else "default"
            found.setdefault(key, Problem(key, _complaint(key, leaf, dict(detail), at=at)))
        return None, list(found.values())


def _key(location: tuple[int | str, ...]) -> str:
    """`data.sources[0].path` from a location of pydantic's; what names the branch of a union is dropped."""
    key = ".".join(map(str, location[:2]))
    for part in location[2:]:
        step = f"{key}[{part}]" if isinstance(part, int) else f"{key}.{part}"
        if isinstance(part, str) and not key.endswith("]"):
            break
        key = step
    return key


def _complaint(key: str, leaf: str, detail: dict[str, Any], *, at: str) -> str:
    if detail["type"] == RULE:
        return str(detail["msg"])
    got = "got nothing" if detail["type"] == "missing" else f"got {shown(detail['input'])}"
    got = f"{got} ({at})"
    if detail["type"] == "extra_forbidden":
        return unknown(key, got)
    return f"{key} must be {fields.accepts(key)}; {got}; try {assignment(leaf)}"


def _origin(key: str, layers: Sequence[Layer]) -> Origin:
    return next((layer.origin for layer in layers if key in layer.values), "default")
