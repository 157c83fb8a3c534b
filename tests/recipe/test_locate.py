"""Where `model.name` is: a folder, a shipped architecture or a hub id; a wrong name ends at once and without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.recipe.field_types import recipes_dir
from launcher.recipe.locate import locate
from launcher.recipe.schema import ModelSection

ARCHITECTURES = recipes_dir() / "architectures"


def test_a_folder_becomes_absolute_and_an_architecture_the_shipped_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert locate(ModelSection(name="mine"), ARCHITECTURES) == str((tmp_path / "mine").resolve())
    shipped = locate(ModelSection(name="unsloth/Llama-3.2-1B-Instruct", init="random"), ARCHITECTURES)
    assert shipped == str(ARCHITECTURES / "Llama-3.2-1B-Instruct")


@pytest.mark.parametrize(
    ("name", "init", "expected"),
    [
        ("./nowhere", "pretrained", "there is no folder"),
        ("${HOME}", "pretrained", r"there is no folder '\$\{HOME\}'"),
        ("empty", "pretrained", "must hold config.json"),
        ("someone/else", "random", "Llama-3.2-1B-Instruct"),
        ("someone/else", "pretrained", r"(?s)someone/else.*Offline.*model.name=/path/to/folder"),
    ],
)
def test_a_model_that_cannot_be_had_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, init: str, expected: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=expected):
        locate(ModelSection.model_validate({"name": name, "init": init}), ARCHITECTURES)


def test_locating_a_model_imports_no_torch() -> None:
    code = (
        "import sys; from launcher.recipe.locate import locate; from launcher.recipe.schema import ModelSection\n"
        "try: locate(ModelSection(name='no/where'), None)\n"
        "except Exception as error: print(type(error).__name__)\n"
        "assert 'huggingface_hub' in sys.modules and 'torch' not in sys.modules"
    )
    root = recipes_dir().parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "RecipeError"), done.stderr
