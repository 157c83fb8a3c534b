"""Answers that need no run: mode=show, recipe=list, mode=schema, mode=keys, --help, --version, completion=SHELL.

On a terminal the tables are drawn; elsewhere they are aligned text, one line a row whatever its length, for grep.
The help is text of at most 80 columns everywhere.
"""

import json
import platform
import textwrap
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from launcher import __version__
from launcher.credentials import masked
from launcher.recipe.command_line import MODES, OPTIONS, parse
from launcher.recipe.completion import completion_script
from launcher.recipe.field_types import recipe_names, recipes_dir
from launcher.recipe.fields import GROUPS, accepts, field, in_words, json_schema, names_in, shown_default
from launcher.recipe.load import Resolved, resolve
from launcher.recipe.own_recipe import OWN_RECIPES
from launcher.recipe.run_options import OPTIONS_OF
from launcher.recipe.yaml_lines import inline

Cells = Sequence[str]
HELP_COLUMNS, NAME_COLUMNS = 80, 24
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")  # that decide what a run does


def print_request(argv: Sequence[str], *, console: Console) -> bool:
    """Answer a command line that asks for information; False if it asks for a run, and nothing was printed.

    Raises:
        RecipeError: mode=show of a recipe that does not resolve.
    """
    options = parse(argv).options
    shell = next((word.partition("=")[2] for word in argv if word.startswith("completion=")), None)
    if {"-h", "--help"} & set(argv) or list(argv) == ["help"]:
        print_help(console)
    elif "--version" in argv:
        print_versions(console)
    elif shell is not None:
        console.out(completion_script(shell), highlight=False)
    elif options["mode"] == "schema":
        console.out(json.dumps(json_schema(), indent=2), highlight=False)
    elif options["mode"] == "keys":
        console.out("\n".join(_keys_page()), highlight=False)
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
        rows.append((key, masked(inline(values[section][name])), origin, field(key)["description"]))
    console.out(f"recipe {resolved.name} ({inline(str(resolved.path))})", highlight=False)
    _print_table(("key", "value", "from", "meaning"), rows, console)


def print_recipes(console: Console) -> None:
    """The shipped recipes, a row each: name, description (the comment at the file's top) and model."""
    rows = []
    for name in recipe_names():
        lines = (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[1:]
        description = " ".join(line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
        model = resolve([f"recipe={name}"]).recipe.model.name
        rows.append((name, description, model.replace(str(recipes_dir()), "recipes", 1)))  # tiny's is a folder
    _print_table(("recipe", "description", "model"), rows, console)


def print_help(console: Console) -> None:
    """The forms of a command line, and every key of a recipe by section: default, meaning and what it accepts."""
    forms = [
        ("recipe=NAME", "a shipped recipe; recipe=list describes them; recipe=path/to/own.yaml is your own"),
        *((f"mode={mode}", meaning) for mode, meaning in MODES.items()),
        ("report=PATH", "write the report there too"),
        (f"blocks={OPTIONS['blocks']}", "how many blocks mode=preview prints"),
        ("key=value", "overrides the recipe, as in train.steps=100; of a list: lora.targets=q_proj,v_proj"),
        ("completion=SHELL", "print a script that completes this command line in bash or zsh"),
        ("--version", "print the versions of this program and of what it runs on"),
    ]
    console.out("usage: launcher/main.py recipe=NAME [mode=MODE] [key=value ...]\n", highlight=False)
    _print_entries(forms, console)
    for mode, options in OPTIONS_OF.items():
        _print_wrapped(f"\nmode={mode}, without recipe: {options.__doc__}", console)
        _print_entries(list(_entries(options.model_json_schema())), console)
    for word, own in OWN_RECIPES.items():
        _print_wrapped(f"\nrecipe={word} writes a file: {own.__doc__}", console)
        _print_entries(list(_entries(own.model_json_schema())), console)
    console.out("\nThe keys of a recipe, with their defaults:", highlight=False)
    for title, description, rows in _groups():
        _print_wrapped(f"\n{title}: {description}", console)
        _print_entries([(f"{key}={value}", f"{meaning} ({kind})") for key, value, kind, meaning in rows], console)


def _entries(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each option with its default, its meaning and what it accepts."""
    for key, option in schema["properties"].items():
        default = inline(option["default"]) if "default" in option else "(required)"
        yield f"{key}={default}", f"{option['description']} ({in_words(option)})"


def print_versions(console: Console) -> None:
    """The versions of this program, of Python and of the packages that decide what a run does, a line each."""
    versions = [("qlora-launcher", __version__), ("python", platform.python_version())]
    for name in PACKAGES:
        try:
            versions.append((name, version(name)))
        except PackageNotFoundError:
            versions.append((name, "not installed"))
    _print_plain(versions, console)


def _groups() -> Iterator[tuple[str, str, list[tuple[str, str, str, str]]]]:
    """Whatever has keys: its title, what it is, and for each key its name, default, what it accepts and its meaning."""
    for group in GROUPS:
        keys = [f"{group}.{name}" for name in names_in(group)]
        rows = [(key.replace("[0]", "[]"), shown_default(key), accepts(key), field(key)["description"]) for key in keys]
        yield group.replace("[0]", "[]"), field(group)["description"], rows


def _keys_page() -> Iterator[str]:
    """The lines of docs/keys.md."""
    yield "# Keys of a recipe\n"
    yield "Written by `python -m launcher mode=keys > docs/keys.md` from `launcher/recipe/schema.py`: change it there."
    yield "`key=value` on the command line overrides a recipe ([how](recipes.md))."
    for title, description, rows in _groups():
        yield f"\n## {title}\n\n{description}\n"
        yield "| key | default | accepts | meaning |\n|---|---|---|---|"
        for key, value, kind, meaning in rows:
            words = f"{kind} | {meaning}".replace("<", "&lt;")
            yield f"| `{key}` | `{value}` | {words} |"


def _print_table(header: Cells, rows: Sequence[Cells], console: Console) -> None:
    if not console.is_terminal:
        _print_plain((header, *rows), console)
        return
    table = Table(*(Column(title, overflow="fold") for title in header))
    for row in rows:
        table.add_row(*map(Text, row))  # as text: square brackets are not markup
    console.print(table)


def _print_entries(entries: Sequence[tuple[str, str]], console: Console) -> None:
    """Names in a column and what they mean beside them; a name that is wider has lines of its own."""
    for name, text in entries:
        if len(name) >= NAME_COLUMNS:
            _print_wrapped(name, console, indent=2)
            name = ""
        _print_wrapped(name.ljust(NAME_COLUMNS) + text, console, indent=2, hanging=NAME_COLUMNS)


def _print_wrapped(text: str, console: Console, *, indent: int = 0, hanging: int = 2) -> None:
    console.out(
        textwrap.fill(
            text,
            min(HELP_COLUMNS, console.width),
            initial_indent=" " * indent,
            subsequent_indent=" " * (indent + hanging),
            replace_whitespace=False,
            break_on_hyphens=False,
        ),
        highlight=False,
    )


def _print_plain(rows: Sequence[Cells], console: Console) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        console.out("  ".join(cells).rstrip(), highlight=False)
