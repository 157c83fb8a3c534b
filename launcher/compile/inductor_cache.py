"""Where compiled code is cached, and how many workers compile it. The cache holds executable code, so its folder is
private to its owner (0700). The environment must be set before torch's compiler is imported.
"""

import hashlib
import os
from pathlib import Path

from launcher.runtime.private_cache import private_cache, temporary_cache, why_unusable

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
TRITON = "TRITON_CACHE_DIR"
TAG = "TORCH_COMPILE_CACHE_KEY_TAG"
OPS = Path(__file__).resolve().parents[1] / "ops"


def prepare_cache(*, workers: int) -> str | None:
    """Point Inductor, and Triton for the kernels of launcher/ops, at private cache folders; cap the compile workers.

    Folders that the user has set in TORCHINDUCTOR_CACHE_DIR or TRITON_CACHE_DIR stay, if nobody else may write them.
    Returns a note for the report where a folder cannot be used (read-only, another user's, or open to others) and a
    temporary one replaces it; else None.
    """
    notes = [_point(VARIABLE, None)]
    notes.append(_point(TRITON, Path(os.environ[VARIABLE], "triton")))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(workers))
    os.environ.setdefault(TAG, key_tag(OPS))
    return "; ".join(filter(None, notes)) or None


def _point(variable: str, usual: Path | None) -> str | None:
    """Set `variable` to a folder whose code may be executed: the one that it names, else the usual one (None: this
    user's cache), else a temporary one, with a note."""
    named = os.environ.get(variable)
    if named or usual:
        folder = Path(named or usual or "")
        reason = why_unusable(folder)
    else:
        folder, reason = private_cache("inductor")
    os.environ[variable] = str(temporary_cache("inductor") if reason else folder)
    if reason is None:
        return None
    set_by = f" ({variable})" if named else ""
    return f"compile cache {folder}{set_by} {reason}: a temporary one is used, so the next run compiles again"


def keep_headers_private() -> None:
    """Have Inductor precompile C++ headers, which become part of compiled code, in its cache folder. It would in
    <temporary folder>/torchinductor_<user>, a name that others can guess and take first. Without them a cold start of
    recipe=tiny compiles for 98 s instead of 48 (two busy cores)."""
    from torch._inductor import codecache

    headers = os.path.join(codecache.cache_dir(), "precompiled_headers")
    for name, folder in (("_HEADER_DIR", headers), ("_HEADER_LOCK_DIR", os.path.join(headers, "locks"))):
        if hasattr(codecache, name):  # torch has no public way
            setattr(codecache, name, folder)


def key_tag(folder: Path) -> str:
    """A digest of the operators' sources, which becomes part of every cache key. torch's own key of a graph names an
    operator but not its backward formula, which is compiled into the graph: a change of it would go unnoticed."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"qlora-launcher-{digest.hexdigest()[:16]}"
