"""Where compiled code is cached, and how many workers compile it. Compile caches hold executable data, so the folder is
private to its owner (0700). Stdlib only: the environment must be set before torch's compiler is imported.
"""

import os
import tempfile

from launcher.private_folder import private_cache

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def prepare_cache(*, workers: int) -> str | None:
    """Point Inductor at a private cache folder and cap its compile workers.

    A folder set by the user in TORCHINDUCTOR_CACHE_DIR is kept. Returns a note for the report when the usual folder
    could not be used (read-only, or another user's) and a temporary one took its place; None otherwise.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(workers))
    if os.environ.get(VARIABLE):
        return None
    folder, reason = private_cache("inductor")
    if reason is None:
        os.environ[VARIABLE] = str(folder)
        return None
    os.environ[VARIABLE] = tempfile.mkdtemp(prefix="qlora-launcher-inductor-")  # mkdtemp makes it 0700
    return f"compile cache {folder} {reason}: a temporary one is used, so the next run compiles again"
