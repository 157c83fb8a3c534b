"""Checkpoints after kills, damages and attacks: a whole one is found or none, and nothing in one is executed."""

import os
import pickle
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint import bundle as bundles
from launcher.checkpoint.adapter import holds_adapter
from launcher.checkpoint.bundle import (
    bundles_of,
    clean,
    faults_of,
    newest_state,
    read_bundle,
    step_of,
    write_bundle,
)
from launcher.checkpoint.writer import BundleWriter
from launcher.errors import CheckpointError
from tests.support.bundles import STATE, adapter_files, written

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


class Killed(BaseException):
    pass


class Fuse:
    """Lets `calls` of the calls it wraps pass, then kills; nothing that it wraps works after that."""

    def __init__(self, calls: int) -> None:
        self.calls_left = calls

    def around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.calls_left:
                raise Killed
            self.calls_left -= 1
            return original(*args, **kwargs)

        return call


def test_fault_30_a_kill_between_any_two_calls_of_a_save_or_a_rotation_leaves_a_whole_bundle(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call that changes the disk is the last one once."""
    for calls in count():
        shutil.rmtree(checkpoints, ignore_errors=True)
        written(checkpoints, 1)
        fuse, killed = Fuse(calls), True
        with monkeypatch.context() as patch:
            patch.setattr(bundles, "save_file", fuse.around(bundles.save_file))
            for name in ("mkdir", "rename", "unlink", "rmdir", "fsync"):
                patch.setattr(os, name, fuse.around(getattr(os, name)))
            writer = BundleWriter(checkpoints, keep=1, save_adapter=lambda folder, _: adapter_files(folder))
            with suppress(Killed):
                writer.write({**STATE, "step": 2}, step=2, eval_losses={}, wait=lambda: None)
                writer.finish()
                killed = False
            writer.close()
        found, _, notes = newest_state(checkpoints)
        assert step_of(found) in (1, 2) and not notes
        assert [fault for bundle in bundles_of(checkpoints) for fault in faults_of(bundle)] == []
        clean(checkpoints)
        assert not list(checkpoints.glob("*.part"))
        if not killed:
            break
    assert calls > 20 and [path.name for path in checkpoints.iterdir()] == ["step-2"]


def test_fault_31_every_truncation_and_flipped_bit_of_every_file_is_seen(checkpoints: Path) -> None:
    [bundle] = written(checkpoints, 3)
    draw = random.Random(0)
    for file in [path for path in bundle.rglob("*") if path.is_file()]:
        whole = file.read_bytes()
        for _ in range(20):
            place = draw.randrange(len(whole))
            flipped = bytes([whole[place] ^ (1 << draw.randrange(8))])
            for damaged in (whole[:place], whole[:place] + flipped + whole[place + 1 :]):
                file.write_bytes(damaged)
                with pytest.raises(CheckpointError, match="must be whole"):
                    read_bundle(bundle)
        file.write_bytes(whole)
    read_bundle(bundle)


def test_fault_31_the_newest_whole_bundle_is_used_and_the_damaged_one_named(checkpoints: Path) -> None:
    written(checkpoints, 2, 10, 9, 12, 11)
    (checkpoints / "step-10" / "state.json").write_text("{")
    (checkpoints / "step-11" / "adapter" / "adapter_config.json").unlink()
    (checkpoints / "step-12" / "adapter" / "README.md").write_text("of somebody else")
    bundle, state, notes = newest_state(checkpoints)
    assert (bundle.name, state["step"]) == ("step-9", 9)
    for note, damaged in zip(
        notes, ["README.md was added", "config.json is missing", "state.json was changed"], strict=True
    ):
        assert damaged in note and note.endswith("step-9 is used.")


def test_fault_31_without_a_whole_bundle_the_run_is_refused_with_code_4(checkpoints: Path) -> None:
    written(checkpoints, 1)
    (checkpoints / "step-1" / "manifest.json").write_text("[" * 100_000)  # deeper than a reader can follow
    with pytest.raises(CheckpointError, match="(?s)none in .*manifest.json cannot be read") as caught:
        newest_state(checkpoints)
    assert caught.value.code == 4
    shutil.rmtree(checkpoints)
    with pytest.raises(CheckpointError, match="has none"):
        newest_state(checkpoints)


class Trap:
    """A pickle of it makes the file `sprung` where it is read."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.sprung), "w"))


@pytest.mark.parametrize(
    "place", ["adapter_model.bin", "optimizer.pt", "r.pkl", WEIGHTS, "manifest", "rest", "tensors"]
)
def test_fault_10_a_pickle_in_a_checkpoint_is_refused_and_not_executed(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Its manifest lists it: whoever could plant it could write that too."""
    trap, sprung = pickle.dumps(Trap(tmp_path / "sprung")), tmp_path / "sprung"
    pickle.loads(trap).close()
    assert sprung.exists()  # the trap works
    sprung.unlink()

    def planted(target: Path) -> None:
        adapter_files(target)
        if "." in place:
            (target / place).write_bytes(trap)
        elif place == "rest":
            (target.parent / "state.json").write_bytes(trap)

    if place == "tensors":
        monkeypatch.setattr(bundles, "save_file", lambda tensors, path: path.write_bytes(trap))
    bundle = write_bundle(checkpoints, STATE, step=3, adapter=planted)
    if place == "manifest":
        (bundle / "manifest.json").write_bytes(trap)
    if place == WEIGHTS:  # a run goes on from the state alone; the proof of an adapter reads this one
        assert not holds_adapter(torch.nn.Module(), bundle / "adapter")
    else:
        with pytest.raises(
            CheckpointError, match="neither safetensors nor JSON|holds safetensors|cannot be read"
        ) as caught:
            newest_state(checkpoints)
        assert caught.value.code == 4
    assert not sprung.exists()
