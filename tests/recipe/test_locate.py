"""Where `model.name` is: a folder, a shipped architecture or a hub id."""

import huggingface_hub
import pytest

from launcher.errors import RecipeError
from launcher.recipe.field_types import recipes_dir
from launcher.recipe.locate import config_file, locate
from launcher.recipe.schema import ModelSection

ARCHITECTURES = recipes_dir() / "architectures"


def test_a_folder_becomes_absolute_and_an_architecture_the_shipped_folder(tmp_path, monkeypatch):
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
        ("./model.Q4_K_M.gguf", "pretrained", "GGUF files are made for llama.cpp"),
        ("gguf", "pretrained", "must hold config.json; .* name the checkpoint that they were made from"),
        ("someone/else", "random", "Llama-3.2-1B-Instruct"),
    ],
)
def test_a_model_that_cannot_be_had_is_named_with_the_remedy(tmp_path, monkeypatch, name, init, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model-f16.gguf").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=expected):
        locate(ModelSection.model_validate({"name": name, "init": init}), ARCHITECTURES)


def test_the_config_of_a_hub_model_is_had_before_torch_needs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: None)  # the hub answers
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *what, revision: cached.append(str(tmp_path / "c")))
    cached: list[str] = []
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *what, revision: cached[0] if cached else None
    )
    assert config_file("owner/name", None) is None
    assert locate(ModelSection(name="owner/name"), ARCHITECTURES) == "owner/name"
    assert config_file("owner/name", None) == tmp_path / "c"
    assert config_file(str(tmp_path), None) == tmp_path / "config.json"
