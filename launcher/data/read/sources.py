"""What a recipe names as a source becomes feeds: one for a file or a dataset of the hub, several for a folder."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launcher.data.read.hub import HUB_ID, find
from launcher.data.read.json_files import json_records
from launcher.data.read.tables import csv_records, parquet_records
from launcher.data.read.text_files import Record, jsonl_records, opened, text_records
from launcher.errors import DataError
from launcher.recipe.data_section import Source

__all__ = ["Feed", "Record", "open_source"]

READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".jsonl": jsonl_records,
    ".json": json_records,
    ".csv": csv_records,
    ".parquet": parquet_records,
    ".txt": text_records,
}
SUPPORTED = ", ".join(READERS)


@dataclass(frozen=True)
class Feed:
    """Rows of one file or one hub dataset, all of one format.

    `identity` changes when the content does: a hash of the file's bytes, or the dataset's commit. A streamed file may
    be too large to be read twice: path, size and time of change stand for its bytes.
    """

    name: str
    format: str  # Source.format
    identity: str
    records: Callable[[], Iterator[Record]]  # from the first row at each call


def open_source(source: Source, *, streaming: bool) -> list[Feed]:
    """The feeds of a source, those of a folder in the order of their paths. No row is read yet.

    Streaming: no feed is ever held as a whole, and a hub dataset is not downloaded as a whole.

    Raises DataError: there is no such file, folder or dataset, a folder has no file of a supported kind, a file cannot
    be read, or config, split or revision is given for what is local.
    """
    try:
        files = _files(source)
    except (OSError, RuntimeError) as error:  # the latter of a home that is not known
        raise _refused(source, f"{error}") from error
    if files is None:
        dataset = find(source)
        records = partial(dataset.records, streaming=streaming)
        return [Feed(dataset.name, source.format, dataset.identity, records)]
    for key in ("config", "split", "revision"):
        if (value := getattr(source, key)) is not None:
            raise DataError(
                f"{source.path}: {key} belongs to a dataset of the hub.\nFound: {key}: {value!r} beside a local path.\n"
                f"Remove it from the source, or name the file of that {key}."
            )
    return [_feed(file, source, streaming=streaming) for file in files]


def _files(source: Source) -> list[Path] | None:
    """The local files of a source; None for what can only be a dataset of the hub."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _files_within(path)
    if path.exists():
        if path.is_file() and path.suffix.lower() in READERS:
            return [path]
        raise _refused(source, f"a {path.suffix or 'nameless'} file" if path.is_file() else "no regular file")
    local = source.path.startswith((".", "/", "~")) or path.suffix.lower() in READERS
    if local or not HUB_ID.fullmatch(source.path):
        raise _refused(source, f"no such file or folder; looked for {path.absolute()}")
    return None


def _refused(source: Source, found: str) -> DataError:
    return DataError(
        f"{source.path}: a source is a {SUPPORTED} file, a folder of such files, or a dataset of the hub.\n"
        f"Found: {found}.\nCorrect the path in data.sources or data.validation, or convert the data."
    )


def _files_within(folder: Path) -> list[Path]:
    inside = [path.relative_to(folder) for path in sorted(folder.rglob("*"))]
    seen = [path for path in inside if not any(part.startswith(".") for part in path.parts)]
    files = [path for path in seen if (folder / path).is_file()]
    usable = [folder / path for path in files if path.suffix.lower() in READERS]
    if usable:
        return usable
    kinds = ", ".join([str(path) for path in files[:5]] + ["…"] * (len(files) > 5)) or "nothing that is not hidden"
    raise DataError(
        f"{folder}: a folder holds files of the kinds {SUPPORTED}.\nFound: {kinds}.\n"
        "Name another folder, or convert the data."
    )


def _feed(file: Path, source: Source, *, streaming: bool) -> Feed:
    suffix, name = file.suffix.lower(), str(file)
    with opened(file, name):
        if streaming:
            status = file.stat()
            identity = f"{file.absolute()}:{status.st_size}:{status.st_mtime_ns}"
        else:
            identity = _digest(file)
    return Feed(name, source.format, f"{suffix}:{identity}", partial(READERS[suffix], file, name))


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
