"""Opens what a recipe names as a source: one feed for a file or a dataset of the hub, several for a folder."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from launcher.data.read.csv_files import read_csv
from launcher.data.read.hub import open_dataset
from launcher.data.read.json_files import read_json
from launcher.data.read.parquet_files import read_parquet
from launcher.data.read.rows import Feed, RawRow, RowFault
from launcher.data.read.text_files import opened, read_jsonl, read_text
from launcher.errors import DataError
from launcher.recipe.data_section import Source
from launcher.recipe.field_types import HUB_ID

FileReader = Callable[[Path, str], Iterator[RawRow | RowFault]]  # (path, its name in messages) -> its rows
FILE_READERS: dict[str, FileReader] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
}
SUPPORTED = ", ".join(FILE_READERS)


def open_source(source: Source, *, streaming: bool) -> list[Feed]:
    """The feeds of a source, those of a folder sorted by path. No row is read yet.

    Streaming: no feed is read before training, and a hub dataset is not downloaded as a whole.

    Raises DataError: there is no such file, folder or dataset, a folder has no file of a supported kind, a file cannot
    be read, or config, split or revision is given for a local path.
    """
    files = local_files(source)
    if not files:
        return [open_dataset(source, streaming=streaming)]
    for key in ("config", "split", "revision"):
        if (value := getattr(source, key)) is not None:
            raise DataError(
                f"{source.path}: {key} belongs to a dataset of the hub.\nFound: {key}: {value!r} beside a local path.\n"
                f"Remove it from the source, or name the file of that {key}."
            )
    return [_file_feed(file, source, streaming=streaming) for file in files]


def local_files(source: Source) -> list[Path]:
    """The local files of a source; none if it can only be a dataset of the hub. Raises DataError as open_source."""
    try:
        return _local_files(source)
    except (OSError, RuntimeError) as error:  # RuntimeError: "~user" of a user without a home
        raise _refused(source, f"{error}") from error


def _local_files(source: Source) -> list[Path]:
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _files_in(path)
    if path.exists():
        if path.is_file() and path.suffix.lower() in FILE_READERS:
            return [path]
        raise _refused(source, f"a {path.suffix or 'nameless'} file" if path.is_file() else "no regular file")
    is_local = source.path.startswith((".", "/", "~")) or path.suffix.lower() in FILE_READERS
    if is_local or not HUB_ID.fullmatch(source.path):
        raise _refused(source, f"no such file or folder; looked for {path.absolute()}")
    return []


def _files_in(folder: Path) -> list[Path]:
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    if supported := [folder / path for path in files if path.suffix.lower() in FILE_READERS]:
        return supported
    names = ", ".join([str(path) for path in files[:5]] + ["…"] * (len(files) > 5)) or "nothing that is not hidden"
    raise DataError(
        f"{folder}: a folder holds files of the kinds {SUPPORTED}.\nFound: {names}.\n"
        "Name another folder, or convert the data."
    )


def _refused(source: Source, found: str) -> DataError:
    return DataError(
        f"{source.path}: a source is a {SUPPORTED} file, a folder of such files, or a dataset of the hub.\n"
        f"Found: {found}.\nCorrect the path in data.sources or data.validation, or convert the data."
    )


def _file_feed(file: Path, source: Source, *, streaming: bool) -> Feed:
    suffix, name = file.suffix.lower(), str(file)
    with opened(file, name) as stream:
        if streaming:
            status = file.stat()
            identity = f"{suffix}:{file.absolute()}:{status.st_size}:{status.st_mtime_ns}"
        else:
            identity = f"{suffix}:{hashlib.file_digest(stream, 'blake2b').hexdigest()[:32]}"
    return Feed(name, source.format, identity, partial(FILE_READERS[suffix], file, name))
