"""A bundle is whole or it is not there, and every changed byte of it is seen."""

import os
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
from launcher.checkpoint.bundle import bundles_of, clean, newest_state, read_bundle, rotate, step_of, write_bundle
from launcher.errors import CheckpointError, DiskError
from tests.support.states import flat

STATE = {
    "step": 3,
    "identity": {"lora.r": 4, "targets": ["q_proj", "k.proj"]},
    "training": {"adapters": {"layers.0.a": torch.arange(6.0).view(2, 3)}, "flag": torch.tensor(True)},
    "early_stop": {},
}


def adapter(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 4}')


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def written(checkpoints: Path, *steps: int) -> list[Path]:
    return [write_bundle(checkpoints, {**STATE, "step": step}, step=step, adapter=adapter) for step in steps]


def test_a_bundle_gives_back_the_state_bit_for_bit(checkpoints: Path) -> None:
    [bundle] = written(checkpoints, 3)
    assert flat(read_bundle(bundle)) == flat(STATE)
    assert sorted(p.name for p in bundle.iterdir()) == ["adapter", "manifest.json", "state.json", "state.safetensors"]
    assert (bundle / "adapter" / "adapter_config.json").exists()
    assert step_of(bundle) == 3


def test_every_truncation_and_flipped_bit_of_every_file_is_seen(checkpoints: Path) -> None:
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


@pytest.mark.parametrize("damage", ["missing", "added"])
def test_a_missing_or_an_added_file_is_named(checkpoints: Path, damage: str) -> None:
    [bundle] = written(checkpoints, 3)
    if damage == "missing":
        (bundle / "adapter" / "adapter_config.json").unlink()
    else:
        shutil.copy(bundle / "state.json", bundle / "adapter" / "adapter_model.bin")
    name = "adapter_config.json is missing" if damage == "missing" else "adapter_model.bin was added"
    with pytest.raises(CheckpointError, match=f"adapter/{name}"):
        read_bundle(bundle)


def test_the_newest_whole_bundle_is_used_and_the_damaged_one_named(checkpoints: Path) -> None:
    written(checkpoints, 2, 10, 9)
    (checkpoints / "step-10" / "state.json").write_text("{")
    bundle, state, notes = newest_state(checkpoints)
    assert (bundle.name, state["step"]) == ("step-9", 9)
    assert len(notes) == 1 and "step-10" in notes[0] and "state.json was changed" in notes[0]


def test_without_a_whole_bundle_the_run_is_refused_with_code_4(checkpoints: Path) -> None:
    written(checkpoints, 1)
    (checkpoints / "step-1" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="(?s)none in .*manifest.json cannot be read") as caught:
        newest_state(checkpoints)
    assert caught.value.code == 4
    shutil.rmtree(checkpoints)
    with pytest.raises(CheckpointError, match="has none"):
        newest_state(checkpoints)


@pytest.mark.parametrize(
    ("eval_losses", "kept"),
    [
        ({}, [10, 4]),
        ({0: 0.5, 2: 1.0, 3: 2.0, 5: 0.1}, [10, 4, 2]),  # step 5 has no bundle
        ({2: 1.0, 3: 1.0, 10: 1.0}, [10, 4, 2]),
        ({2: 3.0, 10: 1.0}, [10, 4]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(
    checkpoints: Path, eval_losses: dict[int, float], kept: list[int]
) -> None:
    written(checkpoints, 1, 2, 3, 4, 10)
    rotate(checkpoints, keep=2, eval_losses=eval_losses)
    assert [step_of(bundle) for bundle in bundles_of(checkpoints)] == kept


class Killed(BaseException):
    pass


class Fuse:
    """Lets `calls` of the calls it wraps pass, then kills."""

    def __init__(self, calls: int) -> None:
        self.calls_left = calls

    def around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.calls_left:
                raise Killed
            self.calls_left -= 1
            return original(*args, **kwargs)

        return call


def test_a_kill_between_any_two_steps_of_a_save_leaves_the_last_bundle_whole(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes the disk fails once, and nothing cleans up after it, as after a kill."""
    written(checkpoints, 1)
    for calls in count():
        fuse = Fuse(calls)
        with monkeypatch.context() as patch:
            for owner, name in ((bundles, "save_file"), (bundles, "_fsync"), (Path, "rename"), (Path, "mkdir")):
                patch.setattr(owner, name, fuse.around(getattr(owner, name)))
            patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)
            with suppress(Killed):
                written(checkpoints, 2)
        found, _, notes = newest_state(checkpoints)
        assert step_of(found) in (1, 2) and not notes
        clean(checkpoints)
        assert not list(checkpoints.glob("*.part"))
        if fuse.calls_left:
            break
        shutil.rmtree(checkpoints / "step-2", ignore_errors=True)
    assert calls > 10


def test_a_full_disk_is_code_7_with_the_bytes_and_leaves_no_staging(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(checkpoints, 1)

    def full(*args: object) -> None:
        raise OSError(28, os.strerror(28))

    for place in ("save_file", "_fsync"):
        monkeypatch.setattr(bundles, place, full)
        with pytest.raises(DiskError, match=r"needs more than \d+ bytes .* are free") as caught:
            written(checkpoints, 2)
        assert caught.value.code == 7
        assert [path.name for path in checkpoints.iterdir()] == ["step-1"]
    read_bundle(checkpoints / "step-1")
