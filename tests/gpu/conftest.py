"""Recipes of the GPU tests, which are left out unless asked for.

pytest -m gpu          on every GPU there is, up to four workers each (tests/conftest.py); -n 0 for one test at a time

Workers of one GPU run side by side. A test marked `alone` measures time: it waits until no other test uses the GPU.
"""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY

Sections = dict[str, dict[str, Any]]
SMALL: Sections = {"model": {"dtype": "bfloat16"}, "compile": {"backend": "inductor"}}
LLAMA_1B: Sections = {
    "model": {"name": "unsloth/Llama-3.2-1B-Instruct", "init": "random"},
    "lora": {"r": 16},
    "data": {"sources": [{"path": str(TINY / "train.jsonl")}], "max_length": 1024, "validation": 0},
    "train": {"steps": 1},
}


@pytest.fixture(autouse=True)
def _share_of_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    lock = Path(tempfile.gettempdir()) / f"qlora-launcher-tests-{os.getuid()}-gpu-{gpu}"
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if request.node.get_closest_marker("alone") else fcntl.LOCK_SH)
        yield


def merged(*layers: Sections) -> Sections:
    sections = {name for layer in layers for name in layer}
    return {name: {key: value for layer in layers for key, value in layer.get(name, {}).items()} for name in sections}


@pytest.fixture
def recipe_over(make_recipe: Callable[..., Any], tmp_path: Path) -> Callable[[Sections], Callable[..., Any]]:
    """`recipe_over(base)`: a recipe factory. The sections given to it are merged over `base`, and that over the small
    model in bf16 with generated kernels; each recipe has a run folder of its own."""
    numbers = count()

    def factory(base: Sections) -> Callable[..., Any]:
        def make(**sections: dict[str, Any]) -> Any:
            folder = {"run": {"output_dir": str(tmp_path / f"run-{next(numbers)}")}}
            return make_recipe(**merged(SMALL, base, folder, sections))

        return make

    return factory


@pytest.fixture
def recipe_of(recipe_over: Callable[[Sections], Callable[..., Any]]) -> Callable[..., Any]:
    """Recipe factory: the small model in bf16 with generated kernels."""
    return recipe_over({})


@pytest.fixture
def recipe_1b(recipe_over: Callable[[Sections], Callable[..., Any]]) -> Callable[..., Any]:
    """Recipe factory: Llama 3.2 1B in bf16 with random weights, on the shipped chats."""
    return recipe_over(LLAMA_1B)
