"""Which files of a folder are read: those of one kind and of one split."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from launcher.data.read.arrow_files import not_saved
from launcher.data.read.packed import is_compressed
from launcher.errors import DataError

# Words in the name of a file or of its folder. Like those of `datasets`, which is slow to import: datasets.data_files
_SPLIT = re.compile(
    r"(?<![a-z])(?:(?P<train>train(?:ing)?)|(?P<validation>validation|valid|val|dev)|(?P<test>tests?|testing)"
    r"|(?P<eval>evals?|evaluations?)|(?P<holdout>h[oe]ld[-_. ]?out))(?:set)?(?![a-z])"
)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # where a word of chatsTest begins
TRAINING = (("train", None),)  # the splits that are read, if the recipe names none: the first of these that has files
VALIDATION = (("validation",), ("eval",), ("holdout",), ("test",), (None,))  # None: files without a split in their name
# Texts and objects that come with data and are none.
_ABOUT = re.compile(
    r"(?:licen[cs]e|readme|requirements|notice|changelog|changes|copying|citation|authors|contributing|robots"
    r"|dataset_infos?|dataset_dict|state|config|metadata|package)\b.*\.(?:txt|json)(?:\.gz|\.zst)?",
    re.IGNORECASE,
)
# What a run writes into run.output_dir (checkpoint/folder.py), which may be the folder of the data.
_RUN_FILES = {
    "metrics.jsonl",
    "metrics.earlier.jsonl",
    "samples.jsonl",
    "report.json",
    "status.json",
    "parts.json",
    "run.lock",
}
_RUN_FOLDERS = {"adapter", "adapter.part", "checkpoints", "bad_batches", "trackers"}
MAX_FILES_NAMED = 5  # files that a message names of each sort


class Selection(NamedTuple):
    files: list[Path]  # relative to the folder
    note: str  # which files these are, and which are left out for what reason; for preview and report


def files_in(folder: Path) -> list[Path]:
    """The files of the folder and its subfolders, relative to it, without hidden ones. Links are followed; a folder
    that several lead to is read once.

    Raises OSError for what cannot be read, leads nowhere, or is neither file nor folder.
    """
    files, visited = list[Path](), set[tuple[int, int]]()
    for parent, subfolders, names in os.walk(folder, followlinks=True, onerror=_raise_unless_gone):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        files += [path.relative_to(folder) for path in paths if _is_file(path)]
    return sorted(files)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _is_file(path: Path) -> bool:
    if path.is_file():
        return True
    if os.path.lexists(path):
        raise OSError(f"{path} in the folder is " + ("a link to nothing" if path.is_symlink() else "no regular file"))
    return False  # removed since it was listed


def select_files(
    folder: Path, kinds: Mapping[Path, str], *, split: str | None, defaults: Sequence[Sequence[str | None]]
) -> Selection:
    """`kinds`: the files, relative to the folder, and the kind of each; "": of none that is read.

    Raises DataError: no file is left, they are of several kinds, it is not clear which split is meant, or a saved
    dataset lacks a file.
    """
    reasons = {path: "no kind of file that is read" for path, kind in kinds.items() if not kind}

    def data() -> list[Path]:
        return [path for path in kinds if path not in reasons]

    reasons |= dict.fromkeys(_of_runs(data(), kinds), "of a run")
    reasons |= dict.fromkeys(not_saved(folder, kinds), "a cache of the saved dataset")
    reasons |= {path: "about the data" for path in data() if _ABOUT.fullmatch(path.name)}
    if tables := sorted({kinds[path] for path in data()} - {".txt"}):
        reasons |= {path: f"text beside {' and '.join(tables)}" for path in data() if kinds[path] == ".txt"}
    packed = [path for path in data() if is_compressed(path)]
    if len(packed) < len(data()):
        reasons |= dict.fromkeys(packed, "packed, beside files that are not")  # often the same rows
    files = _of_split(folder, data(), split, defaults)
    chosen = {*files}
    reasons |= {path: f"split {split_of(path) or 'not named'}" for path in data() if path not in chosen}
    left_out: dict[str, list[Path]] = defaultdict(list)
    for path, reason in reasons.items():
        left_out[reason].append(path)
    found = sorted({kinds[path] for path in files})
    if len(found) != 1:
        raise DataError(
            f"{folder}: a folder holds data files of one kind.\n"
            f"Found: {', '.join(found) or _listed(kinds) or 'nothing that is not hidden'}.\n"
            "Name the files or folders one by one in data.sources, or convert the data."
        )
    others = "; ".join(f"{_listed(paths)} ({reason})" for reason, paths in left_out.items())
    note = f"{folder}: read {_listed(files)}"
    if split is None and (name := split_of(files[0])) and not any(name in names for names in defaults):
        note += f" (by name the split {name}: there is no other)"
    return Selection(files, note + (f"; left out {others}" if others else ""))


def split_of(path: Path) -> str | None:
    """train, validation, test, eval or holdout, by the name of the file, else of the nearest folder that has such a
    word. Of several words train counts: such a file is not left out."""
    for part in reversed(path.parts):
        if words := [match.lastgroup for match in _SPLIT.finditer(_HUMP.sub("_", part).lower())]:
            return "train" if "train" in words else words[-1]
    return None


def _of_runs(files: Iterable[Path], all_files: Iterable[Path]) -> list[Path]:
    """Those that a run wrote. Two of its files show the folder of a run; one alone may be data."""
    found = Counter(path.parent for path in all_files if path.name in _RUN_FILES)
    runs = [folder for folder, count in found.items() if count > 1]

    def is_of(run: Path, path: Path) -> bool:
        parts = path.relative_to(run).parts if path.is_relative_to(run) else ("",)
        return parts[0] in (_RUN_FILES if len(parts) == 1 else _RUN_FOLDERS)

    return [path for path in files if any(is_of(run, path) for run in runs)]


def _of_split(
    folder: Path, files: Sequence[Path], split: str | None, defaults: Sequence[Sequence[str | None]]
) -> list[Path]:
    by_split = {path: split_of(path) for path in files}
    splits = set(by_split.values())
    if split is not None:
        known = _SPLIT.fullmatch(split.lower())
        word = re.compile(rf"(?<![a-z]){re.escape(split.lower())}(?![a-z])")
        chosen = [p for p in files if (by_split[p] == known.lastgroup if known else word.search(p.as_posix().lower()))]
    else:
        wanted = next((names for names in defaults if splits & {*names}), splits if len(splits) == 1 else ())
        chosen = [path for path in files if by_split[path] in wanted]
    if files and not chosen:
        raise DataError(
            f"{folder}: one split of a folder is read, train unless split names another; names of files tell it.\n"
            f"Found: {f'split: {split!r} and ' if split else ''}files of the splits "
            f"{', '.join(sorted(str(name or '(not named)') for name in splits))}.\n"
            "Name one with split: beside the source's path, or name a file."
        )
    return chosen


def _listed(paths: Iterable[Path]) -> str:
    names = [path.as_posix() for path in paths]
    more = [f"{len(names) - MAX_FILES_NAMED:,} more"] if len(names) > MAX_FILES_NAMED else []
    return ", ".join(names[:MAX_FILES_NAMED] + more)
