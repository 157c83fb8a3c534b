"""Prepared data on disk, so that a second start reads what an earlier one prepared.

An entry is one safetensors file, `<cache>/data/<fingerprint>.safetensors`: the arrays of the documents and of the
blocks; in its metadata the caller's meta (JSON), and a checksum of the fingerprint, the meta and every array.
It is written under a temporary name and renamed, and never changes; the checksum finds what a crash left unwritten.
It is read into memory, about 5 bytes a token, not mapped: whatever happens to the file later, a run that has begun
trains on what it has checked. The fingerprint covers this package's source code, so an entry is read only by the code
that would prepare the same.
Whatever is wrong with an entry or with the folder costs a second preparation, never the run.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from launcher.data.documents import Documents
from launcher.data.pack.blocks import Blocks
from launcher.recipe.data_section import DataSection
from launcher.runtime.private_cache import private_cache

MAX_CACHE_BYTES = 20 * 2**30  # of all entries together
MAX_ENTRIES = 32
LEFTOVER_S = 86_400.0  # a temporary file of this age was left by a process that was killed
SUFFIX = ".safetensors"
DECIDING_PACKAGES = ("tokenizers", "transformers", "jinja2", "datasets", "numpy")


@dataclass(frozen=True)
class Entry:
    """The result of a preparation: blocks over the same Documents, and what else the caller needs, as JSON has it."""

    train: Blocks
    validation: Blocks | None
    meta: dict[str, Any]

    @cached_property
    def content(self) -> str:
        """A digest of every array: of what is trained and validated on, whatever made it. 128 hexadecimal digits."""
        digest = hashlib.blake2b()
        for name, array in sorted(self.arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(array.data)
        return digest.hexdigest()

    @cached_property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays and numbers of documents and blocks, as `part.field`."""
        documents = self.train.documents
        parts = {"documents": vars(documents), "train": vars(self.train)}
        if self.validation is not None:
            assert self.validation.documents is documents, "both parts are made of the same documents"
            parts["validation"] = vars(self.validation)
        return {
            f"{part}.{name}": np.asarray(value, order="C")
            for part, fields in parts.items()
            for name, value in fields.items()
            if value is not documents
        }


def fingerprint(
    data: DataSection,
    *,
    identities: Sequence[Sequence[str]],
    tokenizer: Any,
    seed: int,
    stop_ids: Sequence[int] = (),
) -> str:
    """A name for everything that decides the prepared arrays: 40 hexadecimal digits.

    `identities`: of the feeds of each source, in the order of data.sources, a validation source last. They stand for
    the paths. `tokenizer` has the chat template that is used. `stop_ids`: as of Encoder; they end turns.
    """
    section = data.model_dump(
        mode="json", exclude={"wait_s": True, "sources": {"__all__": {"path"}}, "validation": {"path"}}
    )
    if isinstance(data.validation, str):
        section["validation"] = "a path"
    deciding = {
        "code": _code_digest(),
        "versions": [version(package) for package in DECIDING_PACKAGES],
        "data": section,
        "identities": identities,
        "tokenizer": hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.all_special_ids],
        "stops": sorted(stop_ids),
        "template": tokenizer.chat_template,
        "seed": seed,
    }
    return hashlib.blake2b(json.dumps(deciding, sort_keys=True).encode(), digest_size=20).hexdigest()


def _code_digest() -> str:
    package, digest = Path(__file__).parent, hashlib.blake2b()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".jinja")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def load(identity: str) -> Entry | None:
    """The entry of this fingerprint, its arrays read-only; None without one that is whole.

    Every byte is checked. An entry that is damaged, or was saved under another fingerprint, is removed.
    """
    path, unusable = _place(identity)
    if unusable:
        return None
    try:
        entry = _read(path, identity)
        os.utime(path)  # most recently used: evicted last
        return entry
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        _remove(path)
        return None


def save(entry: Entry, identity: str) -> str | None:
    """Keep an entry under this fingerprint and evict the least recently used. A note for the report if that fails."""
    path, unusable = _place(identity)
    if unusable is None:
        try:
            _write(entry, identity, path)
            with suppress(FileNotFoundError):  # another process evicts the same
                _evict(path.parent, keep=path)
            return None
        except (OSError, SafetensorError) as error:
            unusable = f"cannot be written ({getattr(error, 'strerror', None) or error})"
    return f"data cache {path.parent} {unusable}: the next run prepares the data again"


def _place(identity: str) -> tuple[Path, str | None]:
    """The file of this fingerprint, and why the cache cannot be used, if it cannot."""
    folder, unusable = private_cache("data")
    return folder / f"{identity}{SUFFIX}", unusable


def _write(entry: Entry, identity: str, path: Path) -> None:
    meta = json.dumps(entry.meta, default=int)
    metadata = {"meta": meta, "checksum": _checksum(identity, meta, entry)}
    temporary = path.with_name(f".{secrets.token_hex(8)}")
    try:
        safetensors.numpy.save_file(entry.arrays, temporary, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, identity: str) -> Entry:
    """Raises OSError, ValueError, KeyError, TypeError or SafetensorError if this is not what `_write` wrote."""
    raw = path.read_bytes()
    arrays = safetensors.numpy.load(raw)
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    parts: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, array in arrays.items():
        array.flags.writeable = False
        part, field = name.split(".")
        parts[part][field] = array if array.ndim else int(array)
    documents = Documents(**parts.pop("documents"))
    blocks = {part: Blocks(documents, **fields) for part, fields in parts.items()}
    entry = Entry(blocks["train"], blocks.get("validation"), json.loads(metadata["meta"]))
    if _checksum(identity, metadata["meta"], entry) != metadata["checksum"]:
        raise ValueError(f"{path} is damaged, or another entry")
    return entry


def _checksum(identity: str, meta: str, entry: Entry) -> str:
    return hashlib.blake2b((identity + meta + entry.content).encode()).hexdigest()


def _evict(folder: Path, *, keep: Path) -> None:
    """Remove the least recently used entries above the limits, temporary files that killed processes left, and folders,
    which were the entries of earlier versions."""
    for path in folder.iterdir():
        left = path.name.startswith(".") and time.time() - path.lstat().st_mtime > LEFTOVER_S
        if left or path.is_dir():
            _remove(path)
    entries = sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: (path == keep, path.lstat().st_mtime), reverse=True)
    total = 0
    for count, path in enumerate(entries, start=1):
        total += path.lstat().st_size
        if path != keep and (count > MAX_ENTRIES or total > MAX_CACHE_BYTES):
            _remove(path)


def _remove(path: Path) -> None:
    with suppress(OSError):  # another process removed it, or it cannot be removed: then saving says so
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
