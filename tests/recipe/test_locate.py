import subprocess
import sys

import pytest

from launcher.errors import RecipeError
from launcher.recipe.locate import locate
from launcher.recipe.schema import ModelSection
from tests.conftest import ROOT

ARCHITECTURES = ROOT / "recipes" / "architectures"


def test_a_missing_folder_and_a_folder_without_config_are_told_apart(tmp_path):
    with pytest.raises(RecipeError, match="there is no folder"):
        locate(ModelSection.model_validate({"name": str(tmp_path / "nowhere")}), ARCHITECTURES)
    with pytest.raises(RecipeError, match="must hold config.json"):
        locate(ModelSection.model_validate({"name": str(tmp_path)}), ARCHITECTURES)


def test_an_architecture_that_is_not_shipped_lists_those_that_are():
    with pytest.raises(RecipeError, match="Llama-3.2-1B-Instruct"):
        locate(ModelSection.model_validate({"name": "someone/else", "init": "random"}), ARCHITECTURES)


def test_a_hub_id_that_cannot_be_had_names_the_offline_way():
    with pytest.raises(RecipeError, match=r"(?s)someone/else.*model.name=/path/to/folder"):
        locate(ModelSection.model_validate({"name": "someone/else"}), ARCHITECTURES)


def test_a_folder_becomes_absolute_and_an_architecture_the_shipped_folder(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert locate(ModelSection(name="mine"), ARCHITECTURES) == str((tmp_path / "mine").resolve())
    shipped = locate(ModelSection(name="unsloth/Llama-3.2-1B-Instruct", init="random"), ARCHITECTURES)
    assert shipped == str(ARCHITECTURES / "Llama-3.2-1B-Instruct")


def test_locating_a_model_imports_no_torch():
    code = (
        "import sys; from launcher.recipe.locate import locate; from launcher.recipe.schema import ModelSection\n"
        "try: locate(ModelSection(name='no/where'), None)\n"
        "except Exception as error: print(type(error).__name__)\n"
        "assert 'huggingface_hub' in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "RecipeError"), done.stderr
