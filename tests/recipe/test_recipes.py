"""Every recipe that ships: valid, short, described, and without a key that only repeats the default."""

import json

import pytest

from launcher.recipe.field_types import recipe_names, recipes_dir
from launcher.recipe.load import resolve
from launcher.recipe.schema import Recipe

ARCHITECTURES = sorted((recipes_dir() / "architectures").glob("*/config.json"))
# As published: hidden, MLP, layers, heads, key-value heads, head width, rope factor, tied embeddings, parameters
SHAPES = {
    "Llama-3.2-1B-Instruct": (2048, 8192, 16, 32, 8, 64, 32.0, True, 1_235_814_400),
    "Llama-3.2-3B-Instruct": (3072, 8192, 28, 24, 8, 128, 32.0, True, 3_212_749_824),
    "Meta-Llama-3.1-8B-Instruct": (4096, 14336, 32, 32, 8, 128, 8.0, False, 8_030_261_248),
}
per_recipe = pytest.mark.parametrize("name", recipe_names())


def test_the_promised_recipes_ship():
    assert recipe_names() == ["llama1b", "llama1b-t4", "llama3b", "llama8b", "tiny"]


@per_recipe
def test_a_shipped_recipe_is_short_and_described(name):
    lines = (recipes_dir() / f"{name}.yaml").read_text().splitlines()
    assert len(lines) <= 35 and max(map(len, lines)) <= 120
    assert lines[0] == "# yaml-language-server: $schema=schema.json"
    assert lines[1].startswith("# ") and len(lines[1]) > 20


@per_recipe
def test_a_shipped_recipe_sets_only_what_differs_from_the_defaults_and_trains_on_the_shipped_data(name):
    default = Recipe.model_validate({"train": {"steps": 1}}).model_dump()
    resolved = resolve([f"recipe={name}"])
    values = resolved.recipe.model_dump()
    keys = [key.split(".") for key, origin in resolved.origins.items() if origin == "file"]
    assert keys and [key for key in keys if values[key[0]][key[1]] == default[key[0]][key[1]]] == []
    assert [source["path"] for source in values["data"]["sources"]] == [str(recipes_dir() / "tiny" / "train.jsonl")]


def test_the_t4_recipe_is_the_published_challenge_set_up():
    recipe = resolve(["recipe=llama1b-t4"]).recipe
    assert recipe.model.name == "unsloth/Llama-3.2-1B-Instruct" and recipe.model.dtype == "float16"
    assert (recipe.train.micro_batch, recipe.train.accumulation, recipe.data.max_length) == (1, 2, 1024)
    assert (recipe.lora.r, recipe.lora.alpha, recipe.train.steps) == (32, 64, 10)


@pytest.mark.parametrize("path", ARCHITECTURES, ids=lambda path: path.parent.name)
def test_transformers_reads_the_published_shape_and_parameter_count(path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path.parent, local_files_only=True)
    hidden, inter, layers, heads, kv_heads, head_dim, factor, tied, parameters = SHAPES[path.parent.name]
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (hidden, inter, layers)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (heads, kv_heads, head_dim)
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (128256, 131072, 1e-5)
    assert config.tie_word_embeddings == tied
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
    assert layers * layer + hidden + config.vocab_size * hidden * (1 if tied else 2) == parameters


def test_the_large_models_architectures_ship_and_carry_nothing_of_a_machine():
    models = [resolve([f"recipe={name}"]).recipe.model.name for name in ("llama1b", "llama3b", "llama8b")]
    assert [model.split("/")[-1] for model in models] == [path.parent.name for path in ARCHITECTURES] == list(SHAPES)
    for path in ARCHITECTURES:
        assert not {"_name_or_path", "auto_map", "quantization_config"} & set(json.loads(path.read_text()))
