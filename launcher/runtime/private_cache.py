"""Cache folders that nobody else may write: compiled code is executed, prepared data is trained on. Stdlib only.

A folder is trusted if it is this user's and nobody else may write in it, or put another in its place: that takes a
folder above it that others can reach and write, without the sticky bit that /tmp has. What others may have written is
never read, and not made private after the fact.
"""

import atexit
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from launcher.errors import DiskError

OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
OTHERS_MAY_ENTER = stat.S_IXGRP | stat.S_IXOTH
OTHERS = stat.S_IRWXG | stat.S_IRWXO


def private_cache(name: str) -> tuple[Path, str | None]:
    """`<XDG_CACHE_HOME or ~/.cache>/qlora-launcher/<name>`, made 0700; and why it cannot be used, None when it can."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "qlora-launcher" / name
    reason = why_unusable(folder)
    if reason is None and (mode := folder.stat().st_mode) & OTHERS:
        folder.chmod(stat.S_IMODE(mode) & ~OTHERS)
    return folder, reason


def temporary_cache(name: str) -> Path:
    """An empty private folder that goes when the process ends. Raises DiskError where there is no place for one."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"qlora-launcher-{name}-"))  # mkdtemp makes it 0700
    except OSError as error:
        raise DiskError(
            f"a private folder for {name} must be made; {error.strerror}.\nSet TMPDIR to a folder with free space."
        ) from error
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def why_unusable(folder: Path) -> str | None:
    """Why a cache in this folder cannot be trusted or written, in words; None where it can be used. A missing folder is
    made, private; one that is there stays as it is."""
    try:
        for missing in [part for part in (*reversed(folder.parents), folder) if not part.exists()]:
            missing.mkdir(mode=0o700, exist_ok=True)
        if reason := _why_untrusted(folder.resolve()):
            return reason
        if not folder.stat().st_mode & stat.S_IWUSR:  # which root could write in all the same
            return "is read-only"
        with tempfile.NamedTemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"cannot be written ({error.strerror})"


def _why_untrusted(folder: Path) -> str | None:
    status = folder.stat()
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if status.st_mode & OTHERS_MAY_WRITE:
        return f"may be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    if status.st_mode & OTHERS_MAY_ENTER and _holds_what_others_may_write(folder):
        return "holds what others may have written"
    for parent in reversed(folder.parents):
        mode = parent.stat().st_mode
        if not mode & OTHERS_MAY_ENTER:  # nobody else gets to what lies below
            return None
        if mode & OTHERS_MAY_WRITE and not mode & stat.S_ISVTX:
            return f"lies in {parent}, in which others may write (mode {stat.S_IMODE(mode):04o})"
    return None


def _holds_what_others_may_write(folder: Path) -> bool:
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):  # another process compiles
                status = os.lstat(os.path.join(parent, name))
                writable = status.st_mode & OTHERS_MAY_WRITE and not stat.S_ISLNK(status.st_mode)
                if writable or status.st_uid != os.geteuid():
                    return True
    return False
