"""Files of a run: written whole or not at all, never through a link. What the system refuses becomes an error that says
which, and how much room there is. Stdlib only."""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launcher.credentials import masked_tree
from launcher.errors import (
    DISK_FAULTS,
    CheckpointError,
    DiskError,
    FolderError,
    LauncherError,
    RecipeError,
    errno_of,
)


@contextmanager
def writing(folder: Path, *, what: str, needed: int = 0) -> Iterator[None]:
    """Around what writes `what` into `folder`; `needed`: bytes at least, 0 where that is not known. Raises DiskError
    where the disk takes no more or fails, FolderError where the folder is gone or may not be written."""
    try:
        yield
    except LauncherError:
        raise
    except Exception as error:  # safetensors and tokenizers have errors of their own
        number = errno_of(error)
        if number is None:
            raise
        reason = getattr(error, "strerror", None) or os.strerror(number)
        if number in DISK_FAULTS:
            size = f"needs more than {needed:,} bytes" if needed else "does not fit"
            raise DiskError(
                f"the disk must take what a run writes; {folder}: {reason}. {what} {size}; {_room(folder)} free.\n"
                "Free space and run the same command again."
            ) from error
        raise FolderError(
            f"the folder of a run must stay, and stay writable, until its end; {folder}: {reason}."
        ) from error


def _room(folder: Path) -> str:
    try:
        status = os.statvfs(folder)
    except OSError:
        return "unknown how many are"
    no_files = status.f_files and not status.f_favail  # 0 files in all: the file system does not count them
    return f"{status.f_bavail * status.f_frsize:,}{' (but no further file may be made)' if no_files else ''} are"


def refusing_links(path: str, flags: int) -> int:
    """An opener for `open`: raises OSError (ELOOP) for a link in the place of the file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all: a reader never sees half a file."""
    staging = path.with_name(f"{path.name}.{os.getpid()}.part")  # several ranks may report one failure
    try:
        delete(staging)  # of a killed process, or a link that someone planted
        with open(staging, "x", encoding="utf-8") as file:
            file.write(text)
        os.replace(staging, path)
    finally:
        with suppress(OSError):
            staging.unlink(missing_ok=True)


def append_text(path: Path, text: str) -> None:
    """Append whole or not at all."""
    with open(path, "ab", buffering=0, opener=refusing_links) as file:
        size = file.tell()
        rest = text.encode()
        try:
            while rest:  # a disk that is nearly full takes a part of it first
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As `write_text`. NaN and infinity become null, credentials are masked."""
    write_text(path, json.dumps(finite(masked_tree(content)), indent=2) + "\n")


def read_object(file: Path, text: str | None = None, where: str = "") -> dict[str, Any]:
    """The object in a file of a run, or in `text`, the part of it that `where` names. Raises RecipeError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8", errors="replace") if text is None else text)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(file, f"{where}{error}") from None
    if not isinstance(content, dict):
        raise damaged(file, f"{where}it holds no object")
    return content


def damaged(file: Path, reason: str) -> RecipeError:
    """The error of a run's file that is damaged or of another version."""
    return RecipeError(
        f"{file.name} of a run must be whole and of this version; {file} is not: {reason}.\n"
        "Use the version that wrote it, or another run."
    )


def damaged_adapter(file: Path, error: Exception, *, instead: str = "") -> CheckpointError:
    """The error of an adapter's file that is missing or cannot be read. `instead`: what else the user may name."""
    found = f"is damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return CheckpointError(
        f"an adapter must be whole; {file} {found if file.is_file() else 'is missing'}.\n"
        f"Restore it from a copy,{f' name {instead} instead,' if instead else ''} or train again."
    )


def finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def delete(path: Path) -> None:
    """Remove a file or a folder, if it is there; of a link the link, not what it names."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Wait until a folder and all below it are on the disk: some file systems say only then that it is full."""
    for path in (*folder.rglob("*"), folder):
        sync_one(path)


def sync_one(path: Path) -> None:
    """Wait until a file, or the list of a folder's entries, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def writable(path: Path) -> Path:
    """The nearest folder above `path` that is there, or itself. Raises OSError if nothing can be made in it."""
    ancestor = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    number = errno.ENOTDIR if not ancestor.is_dir() else 0 if os.access(ancestor, os.W_OK | os.X_OK) else errno.EACCES
    if number:
        raise OSError(number, os.strerror(number))
    return ancestor
