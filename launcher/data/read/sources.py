"""Opens what a recipe names as a source: one feed for a file or a dataset of the hub, several for a folder."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from launcher.data.read import folders
from launcher.data.read.arrow_files import read_arrow
from launcher.data.read.columns import reshape_of
from launcher.data.read.csv_files import read_csv, told_delimiter
from launcher.data.read.hub import open_dataset
from launcher.data.read.json_files import read_json
from launcher.data.read.packed import is_compressed
from launcher.data.read.parquet_files import read_parquet
from launcher.data.read.rows import Feed, RawRow, RowFault, shown_value
from launcher.data.read.text_files import opened, read_jsonl, read_text
from launcher.errors import DataError, RecipeError
from launcher.recipe.data_section import DataSection, Source
from launcher.recipe.field_types import HUB_ID

FileReader = Callable[[Path, str, int], Iterator[RawRow | RowFault]]  # (path, its name, most bytes of a row) -> rows
FILE_READERS: dict[str, FileReader] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_text,
}
TABLES_OF_TEXT = {".csv", ".tsv"}
SUPPORTED = ", ".join(FILE_READERS) + " (texts also as .gz and .zst)"


class OpenedSource(NamedTuple):
    feeds: list[Feed]  # those of a folder sorted by path
    notes: list[str]  # which files of a folder are read and which are not
    reopen: Callable[[], "OpenedSource"]  # the same source as it is later


@contextmanager
def unchanged(sources: Sequence[OpenedSource]) -> Iterator[None]:
    """Around the reading of opened sources. Raises DataError where a local one is not what it was when it was opened,
    also in place of an error that this may have caused. A dataset of the hub is a commit, which never changes."""

    def check() -> None:
        for source in sources:
            if source.feeds[0].version:
                try:
                    now = source.reopen().feeds
                except DataError:  # it would tell the user to correct the path
                    raise changed(source.feeds[0].name, "went") from None
                _compare(source.feeds, now)

    try:
        yield
    except DataError:
        check()
        raise
    check()


def _compare(before: Sequence[Feed], after: Sequence[Feed]) -> None:
    versions = [{feed.name: (feed.identity, feed.version) for feed in feeds} for feeds in (before, after)]
    for name in sorted(versions[0].keys() | versions[1].keys()):
        if versions[0].get(name) != versions[1].get(name):
            what = "appeared" if name not in versions[0] else "went" if name not in versions[1] else "changed"
            raise changed(name, what)


def open_source(source: Source, *, data: DataSection, validates: bool = False) -> OpenedSource:
    """The feeds of a source of this data section; no row is read yet.

    With data.streaming no feed is read before training, and a hub dataset is not downloaded as a whole. Validation data
    is not streamed, and of a folder its validation files are taken.

    Raises DataError: there is no such file, folder or dataset, a folder has no files of one supported kind and of the
    split, a file cannot be read, or config, revision or (of a file) split is given for a local path; RecipeError as
    reshape_of.
    """
    reshape = reshape_of(source, data.max_row_bytes)
    files, note = local_files(source, validates=validates)
    streaming = data.streaming and not validates
    feeds = [_file_feed(file, source, data, streaming=streaming) for file in files]
    feeds = feeds or [open_dataset(source, streaming=streaming)]
    reopen = partial(open_source, source, data=data, validates=validates)
    notes = [*([note] if note else []), *_delimiter_notes(files, source, data.max_row_bytes)]
    return OpenedSource(reshape(feeds), notes, reopen)


def _delimiter_notes(files: Sequence[Path], source: Source, max_bytes: int) -> Iterator[str]:
    """Of the files in which a header tells another mark between columns than the file's name does."""
    told: dict[str, list[Path]] = defaultdict(list)
    for file in files if source.delimiter is None else ():
        if kind_of(file) in TABLES_OF_TEXT and (mark := told_delimiter(file, max_bytes)):
            told[mark].append(file)
    for mark, those in told.items():
        more = f" and {len(those) - 1:,} more" if len(those) > 1 else ""
        yield f"{those[0]}{more}: read with {shown_value(mark)} between columns, by the header"


def local_files(source: Source, *, validates: bool = False) -> folders.Selection:
    """The local files of a source; none if it can only be a dataset of the hub. Raises DataError as open_source."""
    try:
        path = Path(source.path).expanduser()
        if path.is_dir():
            _refuse_keys(source, "config", "revision")
            kinds = {file: kind_of(file) for file in folders.files_in(path)}
            defaults = folders.VALIDATION if validates else folders.TRAINING
            files, note = folders.select_files(path, kinds, split=source.split, defaults=defaults)
            selection = folders.Selection([path / file for file in files], note)
        else:
            selection = folders.Selection(_local_file(source, path), "")
            if selection.files:
                _refuse_keys(source, "config", "revision", "split")
    except (OSError, RuntimeError) as error:  # RuntimeError: "~user" of a user without a home
        raise _refused(source, f"{error}") from error
    if source.delimiter is not None and not {kind_of(file) for file in selection.files} & TABLES_OF_TEXT:
        kinds_of_text = " and ".join(sorted(TABLES_OF_TEXT))
        raise RecipeError(f"delimiter of a source is for {kinds_of_text} files; {source.path} has none; remove it")
    return selection


def open_validation(data: DataSection) -> OpenedSource | None:
    """The feeds of validation data that is a source of its own."""
    if data.validation_source is None:
        return None
    with errors_name_validation():
        return open_source(data.validation_source, data=data, validates=True)


@contextmanager
def errors_name_validation() -> Iterator[None]:
    """Errors say that they are about the validation data."""
    try:
        yield
    except DataError as error:
        error.args = (f"data.validation: {error}",)
        raise


def kind_of(path: Path) -> str:
    """A key of FILE_READERS, or "" for files that are not read. A packed file has the kind it holds."""
    suffix = path.suffix.lower()
    if is_compressed(path):
        suffix = path.with_suffix("").suffix.lower()
        return suffix if suffix in FILE_READERS and suffix not in (".parquet", ".arrow") else ""  # read out of order
    return suffix if suffix in FILE_READERS else ""


def _refuse_keys(source: Source, *keys: str) -> None:
    for key in keys:
        if (value := getattr(source, key)) is not None:
            raise DataError(
                f"{source.path}: {key} belongs to a dataset of the hub.\nFound: {key}: {value!r} beside a local path.\n"
                f"Remove it from the source, or name the file of that {key}."
            )


def _local_file(source: Source, path: Path) -> list[Path]:
    """The file; none if the source can only be a dataset of the hub."""
    if path.exists():
        if path.is_file() and kind_of(path):
            return [path]
        raise _refused(source, f"a {path.suffix or 'nameless'} file" if path.is_file() else "no regular file")
    is_local = source.path.startswith((".", "/", "~")) or kind_of(path)
    if is_local or not HUB_ID.fullmatch(source.path):
        raise _refused(source, f"no such file or folder; looked for {path.absolute()}")
    return []


def _refused(source: Source, found: str) -> DataError:
    return DataError(
        f"{source.path}: a source is a {SUPPORTED} file, a folder of such files, or a dataset of the hub.\n"
        f"Found: {found}.\nCorrect the path in data.sources or data.validation, or convert the data."
    )


def _file_feed(file: Path, source: Source, data: DataSection, *, streaming: bool) -> Feed:
    kind, name = kind_of(file), str(file)
    with opened(file, name) as stream:
        version = _version(file)  # before the content
        if streaming:
            identity = f"{kind}:{file.absolute()}:{version.rpartition(':')[0]}"  # on another machine the number differs
        else:
            identity = f"{kind}:{hashlib.file_digest(stream, 'blake2b').hexdigest()[:32]}"
    raw_rows = partial(FILE_READERS[kind], file, name, data.max_row_bytes)
    if kind in TABLES_OF_TEXT:
        raw_rows = partial(read_csv, file, name, data.max_row_bytes, delimiter=source.delimiter)
    if streaming:
        raw_rows = partial(_one_pass, raw_rows, file, version)
    return Feed(source.path, name, source.format, identity, raw_rows, version)


def _one_pass(read: Callable[[], Iterator[RawRow | RowFault]], file: Path, version: str) -> Iterator[RawRow | RowFault]:
    """The rows of a file that is read for as long as training goes on. Raises DataError when it has changed."""
    yield from read()
    try:
        now = _version(file)
    except OSError:
        now = ""
    if now != version:
        raise changed(str(file), "changed" if now else "went")


def _version(file: Path) -> str:
    """Size, time and number of a file: differs when it was written, or replaced by another."""
    status = file.stat()
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"


def changed(name: str, what: str) -> DataError:
    return DataError(
        f"{name}: a source must stay as it is while it is read.\nFound: it {what} while it was read.\n"
        "Start again when nothing writes there any more, or name a copy. Nothing was cached."
    )
