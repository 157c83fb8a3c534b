"""Runs that save checkpoints, whole and ended as by a kill."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.bundle import bundles_of, step_of
from tests.support.runs import trained

MakeRecipe = Callable[..., Any]
OFF = {"mode": "off"}
TRAIN = {"steps": 8, "save_every": 2, "eval_every": 4}


@pytest.fixture
def make(make_recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """Recipes of eight steps that save every second one, in the folder `run` unless another is named."""

    def recipe(folder: str = "run", **sections: Any) -> Any:
        train = {**TRAIN, **sections.pop("train", {})}
        place = {"output_dir": str(tmp_path / folder), **sections.pop("run", {})}
        return make_recipe(**{"compile": OFF, **sections}, train=train, run=place)

    return recipe


@pytest.fixture
def killed(make: MakeRecipe, tmp_path: Path) -> Path:
    """The folder of a run that ended as by a kill, its checkpoints of the steps 2 and 4 whole."""
    trained(make(), until=6)
    folder = tmp_path / "run"
    for late in [path for path in bundles_of(folder / "checkpoints") if step_of(path) > 4]:
        shutil.rmtree(late)
    return folder
