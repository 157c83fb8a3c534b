"""Every recipe that ships: valid, short, described, and silent about what is the default anyway."""

import json
from pathlib import Path

import pytest

from launcher.recipe.field_types import recipes_dir
from launcher.recipe.load import recipe_names, resolve

FILES = sorted(recipes_dir().glob("*.yaml"), key=lambda path: path.stem)
ARCHITECTURES = sorted((recipes_dir() / "architectures").glob("*/config.json"))

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, head dimension, rope factor, tied embeddings
    "Llama-3.2-1B-Instruct": (2048, 8192, 16, 32, 8, 64, 32.0, True),
    "Llama-3.2-3B-Instruct": (3072, 8192, 28, 24, 8, 128, 32.0, True),
    "Meta-Llama-3.1-8B-Instruct": (4096, 14336, 32, 32, 8, 128, 8.0, False),
}
PARAMETERS = {  # as published
    "Llama-3.2-1B-Instruct": 1_235_814_400,
    "Llama-3.2-3B-Instruct": 3_212_749_824,
    "Meta-Llama-3.1-8B-Instruct": 8_030_261_248,
}


def test_the_promised_recipes_ship() -> None:
    assert recipe_names() == ["llama1b", "llama1b-t4", "llama3b", "llama8b", "tiny"]
    assert [path.stem for path in FILES] == recipe_names()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_short_and_described(path: Path) -> None:
    resolve([f"recipe={path.stem}"])
    lines = path.read_text().splitlines()
    assert len(lines) <= 35 and max(map(len, lines)) <= 120
    assert lines[0] == "# yaml-language-server: $schema=schema.json"
    assert lines[1].startswith("# ") and len(lines[1]) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_recipe_says_only_what_differs_from_the_defaults(path: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.yaml"
    bare.write_text("train: {steps: 1}\n")
    default, found = resolve([f"recipe={bare}"]).recipe.model_dump(), resolve([f"recipe={path.stem}"])
    dump = found.recipe.model_dump()
    repeated = [
        key
        for key, origin in found.origins.items()
        if origin == "file"
        and dump[key.split(".")[0]][key.split(".")[1]] == default[key.split(".")[0]][key.split(".")[1]]
    ]
    assert repeated == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_recipe_trains_on_the_shipped_data(path: Path) -> None:
    sources = resolve([f"recipe={path.stem}"]).recipe.data.sources
    assert [Path(source.path) for source in sources] == [recipes_dir() / "tiny" / "train.jsonl"]


def test_the_t4_recipe_is_the_published_challenge_set_up() -> None:
    recipe = resolve(["recipe=llama1b-t4"]).recipe
    assert recipe.model.name == "unsloth/Llama-3.2-1B-Instruct" and recipe.model.dtype == "float16"
    assert (recipe.train.micro_batch, recipe.train.accumulation, recipe.data.max_length) == (1, 2, 1024)
    assert (recipe.lora.r, recipe.lora.alpha, recipe.train.steps) == (32, 64, 10)


@pytest.mark.parametrize("name", ["llama1b", "llama3b", "llama8b"])
def test_a_recipe_of_a_large_model_has_its_architecture_shipped(name: str) -> None:
    model = resolve([f"recipe={name}"]).recipe.model.name
    assert recipes_dir() / "architectures" / model.split("/")[-1] / "config.json" in ARCHITECTURES


def test_every_architecture_has_its_published_shape_on_file() -> None:
    assert {path.parent.name for path in ARCHITECTURES} == set(SHAPES) == set(PARAMETERS)


@pytest.mark.parametrize("path", ARCHITECTURES, ids=lambda path: path.parent.name)
def test_transformers_reads_the_shape_and_the_parameter_count_comes_out_as_published(path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path.parent, local_files_only=True)
    hidden, inter, layers, heads, kv_heads, head_dim, factor, tied = SHAPES[path.parent.name]
    found = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads)
    assert found == (hidden, inter, layers, heads)
    assert (config.num_key_value_heads, config.head_dim, config.tie_word_embeddings) == (kv_heads, head_dim, tied)
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (128256, 131072, 1e-5)
    assert config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * hidden * inter + 2 * hidden
    total = layers * layer + hidden + config.vocab_size * hidden * (1 if tied else 2)
    assert total == PARAMETERS[path.parent.name]


def test_an_architecture_carries_shapes_and_nothing_of_a_machine() -> None:
    for path in ARCHITECTURES:
        assert not {"_name_or_path", "auto_map", "quantization_config"} & set(json.loads(path.read_text()))
