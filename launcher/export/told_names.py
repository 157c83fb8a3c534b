"""Names and texts that may be published: without the folders of this machine, and without credentials."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.credentials import masked
from launcher.recipe.field_types import HUB_ID

PATH = re.compile(r"(?<![\w./…])(?:file://)?~?/(?:[^\s/'\"`|]+/)+([^\s/'\"`|,;:)]*)")  # not within a URL
FILE_SUFFIX = re.compile(r"\.[a-zA-Z]\w{0,9}")


def name_told(path: str) -> str:
    """The last component of a path; a hub id whole. Masked: YAML quotes what it must, and would not quote later."""
    return masked(path if _is_hub_id(path) else Path(path).name)


def value_told(value: Any) -> str:
    """A recipe's value without folders of this machine."""
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else str(value)


def paths_of(report: Mapping[str, Any]) -> Iterator[str]:
    """The paths of files and folders that a run's report.json names, hub ids among them."""
    recipe, start = report["recipe"], report["start"]
    yield from (source["path"] for source in recipe["data"]["sources"])
    if isinstance(recipe["data"]["validation"], dict):
        yield recipe["data"]["validation"]["path"]
    model = start["model"].removesuffix(" (random weights)")
    yield from (model, recipe["model"]["name"]) if os.path.isabs(model) else ()
    yield from (path for path in (recipe["run"]["output_dir"], start["recipe"]) if path and "/" in path)


def without_folders(text: str, paths: Iterable[str], *, run_dir: str) -> str:
    """Each path of which only its last component is left: those of `paths` and what lies beside them, whatever
    characters they have, and what looks like one. The home is ~, `run_dir` "the run's folder". Masked."""
    told = {os.path.expanduser("~"): "~"}
    for path in paths:
        told |= dict(_forms(path))
    told[run_dir] = "the run's folder"
    longest_first = sorted((form for form in told if form.strip("~/")), key=len, reverse=True)
    known = "|".join(re.escape(form) + ("" if form.endswith("/") else r"(?!\w)") for form in longest_first)
    return masked(PATH.sub(r"…/\1", re.sub(rf"(?<!\w)(?:{known})", lambda found: told[found[0]], text)))


def _forms(path: str) -> Iterator[tuple[str, str]]:
    """How a path may be written, each with what is told of it; nothing of a hub id."""
    if _is_hub_id(path):
        return
    path = path.removeprefix("file:").rstrip("/")
    plain = os.path.expanduser(path)
    whole = {os.path.abspath(plain), os.path.join(os.getcwd(), plain), os.path.realpath(plain)}
    yield from ((os.path.dirname(form) + "/", "…/") for form in whole)
    yield from ((form, Path(path).name) for form in {path, plain, os.path.normpath(plain), *whole} if "/" in form)


def _is_hub_id(path: str) -> bool:
    suffix = FILE_SUFFIX.fullmatch(Path(path).suffix)
    return not suffix and bool(HUB_ID.fullmatch(path)) and not os.path.lexists(path)
