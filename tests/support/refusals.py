"""Command lines that are refused."""

from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.recipe.load import resolve


def refused(*argv: str) -> str:
    """Resolve a command line that must be refused; returns the message, which has at most five lines and code 2."""
    with pytest.raises(RecipeError) as caught:
        resolve(argv)
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 5, message
    assert caught.value.code == 2
    return message


def own_recipe(folder: Path) -> Path:
    """A recipe file of the user's own, in a folder below this one."""
    path = folder / "folder" / "own.yaml"
    path.parent.mkdir()
    path.write_text("# mine\ntrain:\n  steps: 7\n  lr: 1e-3\nlora:\n  targets: [q_proj]\n")
    return path
