"""This user's cache folders: private (0700), since compiled code and training text lie in them. Stdlib only."""

import os
import stat
import tempfile
from pathlib import Path


def private_cache(name: str) -> tuple[Path, str | None]:
    """`<XDG_CACHE_HOME or ~/.cache>/qlora-launcher/<name>`, made 0700; and why it cannot be used, None when it can."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "qlora-launcher" / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if status.st_uid != os.getuid():
            return folder, "belongs to another user"
        if stat.S_IMODE(status.st_mode) != 0o700:
            folder.chmod(0o700)
        with tempfile.NamedTemporaryFile(dir=folder):
            return folder, None
    except OSError as error:
        return folder, f"cannot be written ({error.strerror})"
