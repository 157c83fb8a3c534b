"""Checkpoints that a kill at any moment leaves whole.

    checkpoints/
      step-120/              a bundle; it gets this name once all of it is on the disk
        manifest.json        size and SHA-256 of every other file
        adapter/             in PEFT's layout: loads in stock PEFT
        state.safetensors    the tensors of the run's state
        state.json           the rest of it
      step-240.part/         being written; left over when the process was killed

Writing: staging folder, fsync of every file and folder, rename, fsync of the parent, and only then older bundles go.
A bundle is never changed. Nothing in it can execute: tensors are safetensors, the rest is JSON.
"""

import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from launcher.checkpoint.files import delete, sync, sync_one, writing
from launcher.checkpoint.folder import PREFIX, bundles_of, step_of
from launcher.errors import CheckpointError

State = dict[str, Any]  # a tree of dicts with strings as keys; leaves are tensors and JSON values

PLAIN_FILES = {".safetensors", ".json", ".md"}  # of files in a bundle; none of them can execute
MANIFEST, TENSORS, REST = "manifest.json", "state.safetensors", "state.json"
STAGING = ".part"


def write_bundle(checkpoints: Path, state: State, *, step: int, adapter: Callable[[Path], None]) -> Path:
    """Write the bundle of `step`; `adapter` writes the adapter's files into the folder that it is given.

    Raises DiskError and FolderError, as `writing` does. Whatever is raised, no bundle is changed and no staging folder
    stays.
    """
    bundle = checkpoints / f"{PREFIX}{step}"
    staging = bundle.with_name(bundle.name + STAGING)
    tensors = dict(tensors_of(state))
    needed = sum(tensor.nbytes for tensor in tensors.values())
    try:
        with writing(checkpoints.parent, what="A checkpoint", needed=needed):
            if checkpoints.is_symlink():
                raise NotADirectoryError(errno.ELOOP, "checkpoints in it is a link, which is not followed")
            checkpoints.mkdir(exist_ok=True)  # no parents: a run folder that is gone stays gone
            delete(staging)
            staging.mkdir()
            sync_one(checkpoints.parent)
            save_file(tensors, staging / TENSORS)
            (staging / REST).write_text(json.dumps(without_tensors(state)), encoding="utf-8")
            adapter(staging / "adapter")
            (staging / MANIFEST).write_text(json.dumps(_manifest(staging), indent=1), encoding="utf-8")
            sync(staging)
            delete(bundle)  # if it is there it is damaged: the run went on from an earlier one
            staging.rename(bundle)
            sync_one(checkpoints)
    finally:
        with suppress(OSError):
            delete(staging)
    return bundle


def read_bundle(bundle: Path) -> State:
    """The state of a bundle, after every byte of it was checked. Raises CheckpointError naming what is damaged."""
    if faults := list(faults_of(bundle)):
        raise CheckpointError(f"a checkpoint must be whole; {bundle} is not: {'; '.join(faults)}.")
    try:
        tensors = load_file(bundle / TENSORS)
        rest = json.loads((bundle / REST).read_text(encoding="utf-8"))
        return with_tensors(dict(rest), tensors)
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:  # whoever wrote the manifest too
        raise CheckpointError(f"a checkpoint holds safetensors and JSON; {bundle} does not: {error}.") from None


def faults_of(bundle: Path) -> Iterator[str]:
    """What is wrong with a bundle, a phrase for each file; nothing if it is whole."""
    try:
        manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
        files, digest = dict(manifest["files"]), manifest["digest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        yield f"{MANIFEST} cannot be read ({error})"
        return
    if digest != _digest_of_files(files):
        yield f"{MANIFEST} was changed"
        return
    present = _manifest(bundle)["files"]
    for name in sorted(files.keys() | present.keys()):
        if name not in present:
            yield f"{name} is missing"
        elif name not in files:
            yield f"{name} was added"
        elif present[name] != files[name]:
            yield f"{name} was changed"
        elif Path(name).suffix not in PLAIN_FILES:
            yield f"{name} is neither safetensors nor JSON"


def newest_state(checkpoints: Path) -> tuple[Path, State, list[str]]:
    """The newest whole bundle, its state, and a note for each newer one that is damaged.

    Raises CheckpointError if there is none that is whole.
    """
    damaged: list[str] = []
    for bundle in bundles_of(checkpoints):
        try:
            return bundle, read_bundle(bundle), [f"{fault} {bundle.name} is used." for fault in damaged]
        except CheckpointError as error:
            damaged.append(str(error))
    raise CheckpointError(
        "a run goes on from a whole checkpoint; "
        + ("\n".join([f"none in {checkpoints} is:", *damaged]) if damaged else f"{checkpoints} has none.")
        + "\nStart a new run in another run.output_dir."
    )


def rotate(checkpoints: Path, *, keep: int, eval_losses: Mapping[int, float]) -> None:
    """Remove all bundles but the `keep` newest and the best."""
    best = best_bundle(checkpoints, eval_losses)
    for bundle in bundles_of(checkpoints)[keep:]:
        if bundle != best:
            remove(bundle)


def best_bundle(checkpoints: Path, eval_losses: Mapping[int, float]) -> Path | None:
    """Of the bundles whose step was evaluated, the one with the lowest eval loss; of equal ones the earliest."""
    evaluated = [bundle for bundle in bundles_of(checkpoints) if step_of(bundle) in eval_losses]
    return min(reversed(evaluated), key=lambda bundle: eval_losses[step_of(bundle)], default=None)


def remove(bundle: Path) -> None:
    """Remove a bundle; a kill meanwhile leaves no half of it under its name."""
    gone = bundle.with_name(bundle.name + STAGING)
    delete(gone)
    bundle.rename(gone)
    delete(gone)


def clean(checkpoints: Path) -> None:
    """Remove what a process that was killed while it wrote or removed a bundle left."""
    for leftover in checkpoints.glob(f"{PREFIX}*{STAGING}"):
        with suppress(OSError):  # what cannot go now may later; its name is no bundle's
            delete(leftover)


def tensors_of(state: State, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state by its keys, joined by dots."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from tensors_of(value, f"{name}{key}.")
        elif isinstance(value, Tensor):
            yield f"{name}{key}", value


def without_tensors(state: State) -> State:
    """The state with null for every tensor: JSON can keep it."""
    return {
        key: without_tensors(value) if isinstance(value, dict) else None if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def with_tensors(rest: State, tensors: dict[str, Tensor], name: str = "") -> State:
    """What `without_tensors` and `tensors_of` took apart."""
    return {
        key: with_tensors(value, tensors, f"{name}{key}.")
        if isinstance(value, dict)
        else tensors.get(f"{name}{key}", value)
        for key, value in rest.items()
    }


def _manifest(folder: Path) -> dict[str, Any]:
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _sha256(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    return {"files": files, "digest": _digest_of_files(files)}


def _digest_of_files(files: dict[str, Any]) -> str:
    """So that a flipped bit in the manifest's own text is seen."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
