"""Prepared data on disk, so that a second start reads what the first one made. An entry is a folder:

    <cache>/data/<fingerprint>/
        documents.{input_ids,supervised,offsets}.npy
        train.{row_offsets,row_documents,widths}.npy          and validation's, where there is one
        meta.json                                             fingerprint, scalars of the blocks, the caller's meta
        checksums                                             "<BLAKE2b>  <file>" of all others, as b2sum prints them

It appears by one rename and is never written again. The arrays are memory-mapped: the ranks of a machine share them.
A fingerprint covers this package's own source too, so an entry is read only by the code that would make it alike.
Whatever is wrong with an entry or the folder costs a second preparation, never the run.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.documents import Documents
from launcher.data.pack.blocks import Blocks
from launcher.recipe.data_section import DataSection, Source
from launcher.runtime.private_cache import private_cache

MAX_BYTES = 20 * 2**30  # of all entries together
MAX_ENTRIES = 32
ABANDONED_S = 86_400.0  # a staging folder this old belongs to no living process
STAGING = ".staging-"

OF_DOCUMENTS = ("input_ids", "supervised", "offsets")
OF_BLOCKS = ("row_offsets", "row_documents", "widths")
SCALARS = ("pad_id", "max_documents", "max_seqlen")
DECIDING = ("tokenizers", "transformers", "jinja2", "datasets", "numpy")  # packages that decide what is prepared


@dataclass(frozen=True)
class Entry:
    """What a preparation leaves: rows over one Documents, and what the caller wants to know of them, as JSON has it."""

    train: Blocks
    validation: Blocks | None
    meta: dict[str, Any]


def fingerprint(data: DataSection, *, identities: Sequence[Sequence[str]], tokenizer: Any, seed: int) -> str:
    """A name for everything that decides the prepared arrays; 40 hexadecimal digits.

    `identities`: of each source's feeds, in the order of data.sources, those of a validation source last. They stand
    for the paths, of which only the suffix counts. `tokenizer` has the chat template that is used.
    """
    section = data.model_dump(mode="json", exclude={"wait_s"})
    for source in section["sources"]:
        source["path"] = Path(source["path"]).suffix
    if isinstance(data.validation, str):
        section["validation"] = ["path", Path(data.validation).suffix]
    elif isinstance(data.validation, Source):
        section["validation"]["path"] = Path(data.validation.path).suffix
    decided = {
        "code": _own_code(),
        "versions": [version(name) for name in DECIDING],
        "data": section,
        "identities": identities,
        "tokenizer": hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.all_special_ids],
        "template": tokenizer.chat_template,
        "seed": seed,
    }
    return hashlib.blake2b(json.dumps(decided, sort_keys=True).encode(), digest_size=20).hexdigest()


def _own_code() -> str:
    package, digest = Path(__file__).parent, hashlib.blake2b()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".jinja")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def load(fingerprint: str) -> Entry | None:
    """The entry of this name, its arrays read-only and on disk still; None when there is none that is whole.

    Every byte is compared with its checksum. An entry that is not whole, or is another's, is removed.
    """
    folder, unusable = private_cache("data")
    path = folder / fingerprint
    if unusable or not os.path.lexists(path):
        return None
    try:
        entry = _read(path, fingerprint)
        os.utime(path)  # used just now: evicted last
        return entry
    except (OSError, ValueError, KeyError, TypeError):
        _remove(path)
        return None


def save(entry: Entry, fingerprint: str) -> str | None:
    """Keep an entry under this name, evict the least recently used ones. A note for the report when it could not."""
    folder, unusable = private_cache("data")
    if unusable is None:
        try:
            _write(entry, fingerprint, folder)
            _evict(folder, keep=fingerprint)
            return None
        except OSError as error:
            unusable = f"cannot be written ({error.strerror or error})"
    return f"data cache {folder} {unusable}: the next run prepares the data again"


def _write(entry: Entry, fingerprint: str, folder: Path) -> None:
    """An entry by that name that somebody else wrote meanwhile stays: it is the same."""
    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
    try:
        checksums = {}
        for name, array in _arrays(entry).items():
            with open(staging / f"{name}.npy", "wb") as file:
                np.save(file, array, allow_pickle=False)
                _settle(file)
            checksums[f"{name}.npy"] = _checksum(staging / f"{name}.npy")
        _write_text(staging / "meta.json", json.dumps({"fingerprint": fingerprint, **_scalars(entry)}, default=int))
        checksums["meta.json"] = _checksum(staging / "meta.json")
        _write_text(staging / "checksums", "".join(f"{digest}  {name}\n" for name, digest in checksums.items()))
        _settle_folder(staging)
        staging.rename(folder / fingerprint)
        _settle_folder(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _parts(entry: Entry) -> Iterator[tuple[str, Blocks]]:
    yield "train", entry.train
    if entry.validation is not None:
        yield "validation", entry.validation


def _arrays(entry: Entry) -> dict[str, NDArray[Any]]:
    arrays = {f"documents.{name}": getattr(entry.train.documents, name) for name in OF_DOCUMENTS}
    for part, blocks in _parts(entry):
        assert blocks.documents is entry.train.documents, "training and validation rows lie in the same documents"
        arrays.update({f"{part}.{name}": getattr(blocks, name) for name in OF_BLOCKS})
    return arrays


def _scalars(entry: Entry) -> dict[str, Any]:
    parts = {part: {name: int(getattr(blocks, name)) for name in SCALARS} for part, blocks in _parts(entry)}
    return {"parts": parts, "meta": entry.meta}


def _read(path: Path, fingerprint: str) -> Entry:
    """Raises OSError, ValueError, KeyError or TypeError when the entry is not what `_write` wrote."""
    lines = (path / "checksums").read_text(encoding="ascii").splitlines()
    checksums = {name: digest for digest, name in (line.split("  ") for line in lines)}

    def checked(name: str) -> Path:
        if _checksum(path / name) != checksums[name]:
            raise ValueError(f"{path / name} is damaged")
        return path / name

    def array(name: str) -> Any:
        # A plain array over the map: slices of np.memmap cost several times those of an array, and rows are slices.
        return np.asarray(np.load(checked(f"{name}.npy"), mmap_mode="r", allow_pickle=False))

    stored = json.loads(checked("meta.json").read_text(encoding="utf-8"))
    if stored["fingerprint"] != fingerprint:
        raise ValueError(f"{path} holds another entry")
    documents = Documents(*(array(f"documents.{name}") for name in OF_DOCUMENTS))
    parts = {
        part: Blocks(documents, **{name: array(f"{part}.{name}") for name in OF_BLOCKS}, **scalars)
        for part, scalars in stored["parts"].items()
    }
    return Entry(parts["train"], parts.get("validation"), stored["meta"])


def _evict(folder: Path, *, keep: str) -> None:
    """Remove what is too much, least recently used first, and what a process left that was killed while it wrote."""
    entries = []
    for path in folder.iterdir():
        with suppress(OSError):  # somebody else removes it
            used, size = path.stat().st_mtime, sum(file.stat().st_size for file in path.iterdir())
            if not path.name.startswith(STAGING):
                entries.append((path.name == keep, used, size, path))
            elif time.time() - used > ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
    total = 0
    for count, (kept, _, size, path) in enumerate(sorted(entries, reverse=True), start=1):
        total += size
        if not kept and (count > MAX_ENTRIES or total > MAX_BYTES):
            _remove(path)


def _remove(path: Path) -> None:
    """At once for everybody who looks for it; its files go one by one."""
    grave = path.with_name(STAGING + secrets.token_hex(8))
    with suppress(OSError):  # somebody else removed it, or it cannot be: then saving says so
        path.rename(grave)
        if grave.is_dir() and not grave.is_symlink():
            shutil.rmtree(grave, ignore_errors=True)
        else:
            grave.unlink()


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        _settle(file)


def _settle(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _settle_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
