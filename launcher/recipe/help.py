"""Answers that need no run: mode=show, recipe=list, mode=schema, --help.

On a terminal the tables are drawn; elsewhere they are aligned text, one line a row whatever its length, for grep.
"""

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from launcher.recipe.command_line import MODES, OPTIONS, parse
from launcher.recipe.field_types import recipe_names, recipes_dir
from launcher.recipe.fields import LEAVES, accepts, field, json_schema
from launcher.recipe.load import Resolved, resolve
from launcher.recipe.yaml_lines import inline

Cells = Sequence[str]


def print_request(argv: Sequence[str], *, console: Console) -> bool:
    """Answer a command line that asks for information; False if it asks for a run, and nothing was printed.

    Raises:
        RecipeError: mode=show of a recipe that does not resolve.
    """
    options = parse(argv).options
    if {"-h", "--help"} & set(argv) or list(argv) == ["help"]:
        print_help(console)
    elif options["mode"] == "schema":
        console.out(json.dumps(json_schema(), indent=2), highlight=False)
    elif options["recipe"] == "list":
        print_recipes(console)
    elif options["mode"] == "show":
        print_resolved(console, resolve(argv))
    else:
        return False
    return True


def print_resolved(console: Console, resolved: Resolved) -> None:
    """The resolved recipe: each key, its value, where that comes from and what it means."""
    values = resolved.recipe.model_dump()
    rows = []
    for key, origin in resolved.origins.items():
        section, name = key.split(".")
        rows.append((key, inline(values[section][name]), origin, field(key)["description"]))
    console.out(f"recipe {resolved.name} ({inline(str(resolved.path))})", highlight=False)
    _print_table(("key", "value", "from", "meaning"), rows, console)


def print_recipes(console: Console) -> None:
    """The shipped recipes, a row each: name, description (the file's first comment) and model."""
    rows = []
    for name in recipe_names():
        description = (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")
        model = resolve([f"recipe={name}"]).recipe.model.name
        rows.append((name, description, model.replace(str(recipes_dir()), "recipes", 1)))  # tiny's is a folder
    _print_table(("recipe", "description", "model"), rows, console)


def print_help(console: Console) -> None:
    """The forms of a command line, and every key of a recipe with what it accepts."""
    lines = [
        ("recipe=NAME", "a shipped recipe; recipe=list describes them; recipe=path/to/own.yaml is your own"),
        *((f"mode={mode}", meaning) for mode, meaning in MODES.items()),
        ("report=PATH", "write the report there too"),
        ("blocks=N", f"how many blocks mode=preview prints; {OPTIONS['blocks']} if not given"),
        ("key=value", "overrides the recipe, as in train.steps=100 'lora.targets=[q_proj, v_proj]'"),
    ]
    console.out(
        "usage: launcher/main.py recipe=NAME [key=value ...] [mode=MODE] [report=PATH] [blocks=N]\n", highlight=False
    )
    _print_plain(lines, console)
    console.out()
    rows = [(key, accepts(key), field(key)["description"]) for key in LEAVES]
    _print_table(("key", "value", "meaning"), rows, console)


def _print_table(header: Cells, rows: Sequence[Cells], console: Console) -> None:
    if not console.is_terminal:
        _print_plain((header, *rows), console)
        return
    table = Table(*(Column(title, overflow="fold") for title in header))
    for row in rows:
        table.add_row(*map(Text, row))  # as text: square brackets are not markup
    console.print(table)


def _print_plain(rows: Sequence[Cells], console: Console) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        console.out("  ".join(cells).rstrip(), highlight=False)
