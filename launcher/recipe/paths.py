"""Relative paths of a recipe: which folder they start from, and where one lies that was looked for elsewhere."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.recipe.command_line import bare, echoed

Values = dict[str, Any]  # by dotted key


def from_folder(value: Any, folder: Path) -> Any:
    """Texts that begin with ./ or ../ become paths from `folder`, ~/ from the home folder; the rest stays as it is."""
    if isinstance(value, dict):
        return {key: from_folder(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [from_folder(item, folder) for item in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return os.path.normpath(folder / value)
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def misplaced(values: Values, folder: Path, recipe_folder: Path) -> Iterator[tuple[str, str]]:
    """Key and error of each path in `values`, a layer whose ./ is `folder`, that is not where it is looked for, but is
    in the recipe file's folder or in the working directory."""
    for key, text in _named_paths(values):
        start = folder if text.startswith(("./", "../")) else Path.cwd()
        if os.path.isabs(os.path.expanduser(text)) or os.path.exists(start / text):
            continue
        other = next((place for place in (recipe_folder, Path.cwd()) if os.path.exists(place / text)), None)
        if other is None:
            continue
        there = os.path.normpath(other / text)
        near = f"./{os.path.normpath(text)}" if other == folder else os.path.relpath(there)
        remedy = near if other == folder or not near.startswith("..") else there
        where = "beside the recipe file" if other == recipe_folder else "in the working directory"
        rule = f"{bare(key)} is looked for in {bare(str(start))}"
        yield key, f"{rule}; got {echoed(text)}, which lies {where}; did you mean {bare(remedy)}?"


def _named_paths(values: Values) -> Iterator[tuple[str, str]]:
    """The paths and names that a run reads from: of the model, an adapter, the sources and the validation data."""
    sources = values.get("data.sources")
    entries = {f"data.sources[{i}].path": entry for i, entry in enumerate(sources if isinstance(sources, list) else ())}
    entries |= {key: values[key] for key in ("model.name", "data.validation", "lora.start_from") if key in values}
    for key, entry in entries.items():
        text = entry.get("path") if isinstance(entry, dict) else entry
        if isinstance(text, str) and text:
            yield key, text
