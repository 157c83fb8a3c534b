"""A recipe file of the user's own, and the message that a refused command line gets."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.refusals import own_recipe, refused


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return own_recipe(tmp_path)


@pytest.fixture
def refusal() -> Callable[..., str]:
    return refused
