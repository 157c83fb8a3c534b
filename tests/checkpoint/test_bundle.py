"""What a bundle holds. Kills and damages: tests/faults/test_damaged_checkpoints.py."""

import shutil
from pathlib import Path

import pytest

from launcher.checkpoint.bundle import bundles_of, read_bundle, rotate, step_of
from launcher.errors import CheckpointError
from tests.support.bundles import STATE, written
from tests.support.states import flat


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_a_bundle_gives_back_the_state_bit_for_bit(checkpoints: Path) -> None:
    [bundle] = written(checkpoints, 3)
    assert flat(read_bundle(bundle)) == flat(STATE)
    assert sorted(p.name for p in bundle.iterdir()) == ["adapter", "manifest.json", "state.json", "state.safetensors"]
    assert (bundle / "adapter" / "adapter_config.json").exists()
    assert step_of(bundle) == 3


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
