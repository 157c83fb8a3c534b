"""This user's cache folders: private (0700), since compiled code and training text lie in them. Stdlib only."""

import os
import stat
import tempfile
from pathlib import Path


def private_cache(name: str) -> tuple[Path, str | None]:
    """`<XDG_CACHE_HOME or ~/.cache>/qlora-launcher/<name>`, made 0700; and why it cannot be used, None when it can."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "qlora-launcher" / name
    return folder, _make_private(folder)


def _make_private(folder: Path) -> str | None:
    """Why `folder` cannot be this user's private, writable cache; None when it is."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
        if found.st_uid != os.getuid():
            return "belongs to another user"
        if stat.S_IMODE(found.st_mode) != 0o700:
            folder.chmod(0o700)
        with tempfile.NamedTemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"cannot be written ({error.strerror})"
