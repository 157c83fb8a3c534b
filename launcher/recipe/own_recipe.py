"""recipe=copy and recipe=new: the words of both, and the file of the user's own that they write. It is never replaced.

recipe=copy is answered here; recipe=new reads data and a model (launcher/commands/new_recipe.py).
"""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field

from launcher import __version__
from launcher.errors import DiskError, RecipeError, is_full_disk
from launcher.recipe.command_line import echoed
from launcher.recipe.field_types import NonEmptyText, RecipeSection, recipe_names, recipes_dir
from launcher.recipe.load import recipe_path
from launcher.recipe.schema import ModelSection
from launcher.recipe.yaml_lines import inline, read_file, scalars

SCHEMA_LINE = re.compile(r"\$schema=(?!/|\w+:)(\S+)")  # a relative one, as editors read it


class CopyOptions(RecipeSection):
    """A shipped recipe as a file of your own; its relative paths become absolute ones."""

    source: NonEmptyText = Field(
        alias="from", description="Shipped recipe, or a path that ends in .yaml.", examples=["llama1b", "./mine.yaml"]
    )
    to: NonEmptyText = Field(description="File to write, new; it ends in .yaml.", examples=["./mine.yaml"])


class NewOptions(RecipeSection):
    """A recipe for your data and a model, each value with its reason."""

    data: NonEmptyText = Field(
        description="Training data: a file, a folder or a dataset of the hub.", examples=["./my.jsonl"]
    )
    to: NonEmptyText = Field(description="File to write, new; it ends in .yaml.", examples=["./mine.yaml"])
    model: NonEmptyText = Field(
        ModelSection().name, description="Hub id or local folder of the base model.", examples=["./my-model"]
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokens"] = Field(
        "auto", description="Columns of the rows; auto: recognised from the first row."
    )


OWN_RECIPES: dict[str, type[CopyOptions] | type[NewOptions]] = {"copy": CopyOptions, "new": NewOptions}


def copy_recipe(options: CopyOptions) -> Path:
    """Write the copy; returns its path. Raises RecipeError where there is no such recipe or the file cannot be made."""
    to, path = target(options.to), recipe_path(options.source, "from").absolute()
    read_file(path)  # refuses what is no recipe
    text, folder = path.read_text(encoding="utf-8-sig"), path.parent
    relative = [place for place in scalars(text) if place[0].startswith(("./", "../"))]
    for value, start, end in sorted(relative, key=lambda place: -place[1]):  # from the last: the others stay in place
        text = text[:start] + inline(os.path.normpath(folder / value)) + text[end:]
    text = SCHEMA_LINE.sub(lambda match: f"$schema={os.path.normpath(folder / match[1])}", text, count=1)
    head, break_, rest = text.partition("\n")
    first, second = (head + break_, rest) if "$schema=" in head else ("", text)
    name = options.source if options.source in recipe_names() else " ".join(str(path).split())
    write_own(to, f"{first}# A copy of the recipe {name}, made by qlora-launcher {__version__}.\n{second}")
    return to


def target(to: str) -> Path:
    """The absolute path of a recipe to write. Raises RecipeError unless it ends in .yaml and is new in a folder."""
    path = Path(os.path.expanduser(to)).absolute()
    if path.suffix != ".yaml":
        raise RecipeError(f"to must end in .yaml; got {echoed(to)}; try {echoed(f'to={to}.yaml')[1:-1]}")
    if os.path.lexists(path):
        raise RecipeError(f"to must be a new file; {echoed(to)} exists; choose another name, or remove it")
    if not path.parent.is_dir():
        raise RecipeError(f"to must lie in a folder that exists; there is no {path.parent}; make it first")
    return path


def write_own(path: Path, text: str) -> None:
    """Write a new recipe. Raises RecipeError if it exists or cannot be written, DiskError if there is no room."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        if is_full_disk(error):
            path.unlink(missing_ok=True)
            raise DiskError(f"the recipe must fit on the disk; {path}: {error.strerror}. Free space.") from None
        raise RecipeError(f"to must be a file that can be written; {path}: {error.strerror}; choose another") from None


def next_steps(path: Path) -> str:
    """What to run with a recipe that was written, and how."""
    program = "qlora-launcher" if Path(sys.argv[0]).name == "qlora-launcher" else "python launcher/main.py"
    near = os.path.relpath(path)
    word = shlex.quote(f"recipe={path if near.startswith('..') else near}")
    recipe = f"{program} {word}"
    return "\n".join(
        (
            f"{recipe} mode=preview  # what is trained on, token by token",
            f"{recipe} mode=check    # whether this machine has what it needs",
            f"{recipe}               # train",
        )
    )


def schema_line() -> str:
    """The comment by which editors complete and check a recipe."""
    return f"# yaml-language-server: $schema={recipes_dir() / 'schema.json'}"
