"""Disk, folders and memory: each check is made to fail, and its figures are compared with what a run takes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from launcher.checkpoint.folder import RunFolder
from launcher.errors import DiskError, MemoryExhausted, RecipeError
from launcher.memory.ledger import Ledger
from launcher.model.build import check_model
from launcher.model.load import load_config
from launcher.preflight import space
from launcher.preflight.space import bundle_bytes, check_disk, check_folders, check_memory
from tests.support.runs import trained

CPU = torch.device("cpu")
MakeRecipe = Callable[..., Any]


@pytest.fixture
def parts(make_recipe: MakeRecipe) -> Callable[..., tuple[Any, Any, Any]]:
    """A recipe, its config and its model without weights."""

    def make(**sections: Any) -> tuple[Any, Any, Any]:
        recipe = make_recipe(**sections)
        config = load_config(recipe.model.name, recipe.model)
        return recipe, config, check_model(recipe, recipe.model.name, config, CPU)

    return make


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.usefixtures("clean_dynamo")
@pytest.mark.parametrize(
    ("optimizer", "init"),
    [
        ("adamw", "default"),
        ("adamw_8bit", "default"),
        ("adafactor", "default"),
        ("lion_8bit", "default"),
        ("muon", "olora"),
    ],
)
def test_the_bytes_of_a_checkpoint_are_those_that_a_run_writes(
    make_recipe: MakeRecipe, tmp_path: Path, optimizer: str, init: str
) -> None:
    rank = 256 if init == "default" else 32  # no weight of the model has more than 32 components
    recipe = make_recipe(
        compile={"mode": "off"},
        lora={"r": rank, "init": init},
        train={"steps": 1, "save_every": 1, "optimizer": optimizer},
    )
    start = next(event for event in trained(recipe) if hasattr(event, "trainable"))
    written = on_disk(tmp_path / "run" / "checkpoints" / "step-1")
    assert 0.85 < bundle_bytes(recipe, start.trainable) / written < 1.05  # small tensors of 8 bits have large tables


def test_a_disk_without_room_for_what_a_run_writes_is_refused(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _, model = parts(train={"keep": 3})
    folder, free = RunFolder(tmp_path / "deep" / "run"), [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    check = lambda recipe=recipe: check_disk(recipe, recipe.model.name, model, folder)  # noqa: E731
    with pytest.raises(DiskError, match=rf"MiB for checkpoints in {folder.path}, .* and 0 are free.\nFree space"):
        check()
    free[0] = 10**9
    assert "MiB for checkpoints" in check()
    never = parts(train={"save_every": "off"})[0]
    assert "checkpoints" not in check(never) and "the adapter" in check(never)
    bundle = folder.checkpoints / "step-4"
    bundle.mkdir(parents=True)
    (bundle / "state.safetensors").write_bytes(bytes(10**7))  # what is there already needs no room
    assert "checkpoints" not in check()


def test_a_model_that_is_not_downloaded_needs_room_in_the_hubs_cache(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _, model = parts()
    monkeypatch.setattr(space, "read_headers", lambda source, revision: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(DiskError, match="MiB for some/model in .*hub"):
        check_disk(recipe, "some/model", model, RunFolder(tmp_path / "run"))


def test_without_a_temporary_folder_nothing_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "temporary files in" in check_folders()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(RecipeError, match="temporary files need a folder that can be written; No such file"):
        check_folders()


def test_a_cache_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "cannot be written" in check_folders()


def test_a_model_that_does_not_fit_into_the_machines_memory_is_refused(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "free on cpu" in check_memory(*parts(), CPU)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20, total=2**30))
    with pytest.raises(MemoryExhausted, match="4 MiB for weights, adapters and optimizer, 1 MiB free on cpu"):
        check_memory(*parts(), CPU)


@pytest.mark.parametrize("batching", ["packed", "padded", "bucketed"])
def test_a_forecast_beyond_the_free_memory_of_a_gpu_is_refused(
    parts: Any, monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    train = {"steps": 1, "micro_batch": 512}
    made = parts(model={"dtype": "float32"}, data={"batching": batching, "max_length": 512}, train=train)
    free = [100.0]
    monkeypatch.setattr(Ledger, "free_mib", lambda self: free[0])
    if batching == "bucketed":  # the widths are not known yet
        assert "free on cpu" in check_memory(*made, CPU)
        free[0] = 1.0
    with pytest.raises(MemoryExhausted, match=r"a peak with activations offload, .* free on cpu.\nEnd what else"):
        check_memory(*made, CPU)
    free[0] = 100_000.0
    assert "activations none" in check_memory(*made, CPU)
