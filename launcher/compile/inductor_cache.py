"""Where compiled code is cached, and how many workers compile it. The cache holds executable code, so its folder is
private to its owner (0700). Stdlib only: the environment must be set before torch's compiler is imported.
"""

import hashlib
import os
import tempfile
from pathlib import Path

from launcher.runtime.private_cache import private_cache

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
TRITON = "TRITON_CACHE_DIR"
TAG = "TORCH_COMPILE_CACHE_KEY_TAG"
OPS = Path(__file__).resolve().parents[1] / "ops"


def prepare_cache(*, workers: int) -> str | None:
    """Point Inductor, and Triton for the kernels of launcher/ops, at a private cache folder; cap the compile workers.

    Folders that the user has set in TORCHINDUCTOR_CACHE_DIR or TRITON_CACHE_DIR stay. Returns a note for the report
    where the usual folder cannot be used (read-only, or another user's) and a temporary one replaces it; else None.
    """
    note = _point_inductor()
    os.environ.setdefault(TRITON, os.path.join(os.environ[VARIABLE], "triton"))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(workers))
    os.environ.setdefault(TAG, key_tag(OPS))
    return note


def _point_inductor() -> str | None:
    if os.environ.get(VARIABLE):
        return None
    folder, reason = private_cache("inductor")
    if reason is None:
        os.environ[VARIABLE] = str(folder)
        return None
    os.environ[VARIABLE] = tempfile.mkdtemp(prefix="qlora-launcher-inductor-")  # mkdtemp makes it 0700
    return f"compile cache {folder} {reason}: a temporary one is used, so the next run compiles again"


def key_tag(folder: Path) -> str:
    """A digest of the operators' sources, which becomes part of every cache key. torch's own key of a graph names an
    operator but not its backward formula, which is compiled into the graph: a change of it would go unnoticed."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"qlora-launcher-{digest.hexdigest()[:16]}"
