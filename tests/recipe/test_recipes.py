"""Every recipe that ships: valid, short, described, and without a key that only repeats the default."""

import json
from pathlib import Path

import pytest
import torch

from launcher.errors import RecipeError
from launcher.model.families import head_width
from launcher.preflight.before_torch import check_located
from launcher.recipe.field_types import recipe_names, recipes_dir
from launcher.recipe.load import resolve
from launcher.recipe.schema import Recipe

ARCHITECTURES = sorted((recipes_dir() / "architectures").glob("*/config.json"))
# As published: hidden, MLP, layers, heads, key-value heads, head width, vocabulary, positions, rope theta, tied
# embeddings, parameters
SHAPES = {
    "Llama-3.2-1B-Instruct": (2048, 8192, 16, 32, 8, 64, 128256, 131072, 5e5, True, 1_235_814_400),
    "Llama-3.2-3B-Instruct": (3072, 8192, 28, 24, 8, 128, 128256, 131072, 5e5, True, 3_212_749_824),
    "Meta-Llama-3.1-8B-Instruct": (4096, 14336, 32, 32, 8, 128, 128256, 131072, 5e5, False, 8_030_261_248),
    "Phi-4-mini-instruct": (3072, 8192, 32, 24, 8, 128, 200064, 131072, 1e4, True, 3_836_021_760),
    "Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12, 2, 128, 151936, 32768, 1e6, True, 1_543_714_304),
    "Qwen2.5-7B-Instruct": (3584, 18944, 28, 28, 4, 128, 152064, 32768, 1e6, False, 7_615_616_512),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, 128, 151936, 40960, 1e6, True, 1_720_574_976),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 128, 151936, 40960, 1e6, False, 8_190_735_360),
    "SmolLM3-3B": (2048, 11008, 36, 16, 4, 128, 128256, 65536, 5e6, True, 3_075_098_624),
    "gemma-3-1b-it": (1152, 6912, 26, 4, 1, 256, 262144, 32768, 1e6, True, 999_885_952),
    "mistral-7b-instruct-v0.3": (4096, 14336, 32, 32, 8, 128, 32768, 32768, 1e6, False, 7_248_023_552),
}
ROPE_FACTORS = {"Llama-3.2-1B-Instruct": 32.0, "Llama-3.2-3B-Instruct": 32.0, "Meta-Llama-3.1-8B-Instruct": 8.0}
per_recipe = pytest.mark.parametrize("name", recipe_names())


def test_the_promised_recipes_ship():
    llamas, qwens = ["llama1b", "llama1b-t4", "llama3b", "llama8b"], ["2.5-1.5b", "2.5-7b", "3-1.7b", "3-8b"]
    others = ["gemma3-1b", "mistral7b", "phi4-mini", "smollm3-3b", "tiny"]
    assert recipe_names() == sorted([*llamas, *(f"qwen{name}" for name in qwens), *others])


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
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path.parent, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    shape = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads)
    shape += (config.num_key_value_heads, head_width(config), config.vocab_size, config.max_position_embeddings)
    shape += (rope["rope_theta"], config.tie_word_embeddings, sum(p.numel() for p in model.parameters()))
    assert shape == SHAPES[path.parent.name]
    assert rope.get("factor") == ROPE_FACTORS.get(path.parent.name)
    assert config.dtype == torch.bfloat16


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "tiny"])
def test_every_recipe_passes_the_checks_of_its_model_without_a_network(name):
    recipe = resolve([f"recipe={name}", "model.init=random"]).recipe
    assert Path(check_located(recipe, recipes_dir())).name == recipe.model.name.split("/")[1]


def test_what_a_model_does_not_take_is_refused_by_its_shipped_config():
    recipe = resolve(["recipe=phi4-mini", "model.init=random", "data.max_length=8192"]).recipe
    with pytest.raises(RecipeError, match="4,?096"):
        check_located(recipe, recipes_dir())


def test_the_large_models_architectures_ship_and_carry_nothing_of_a_machine():
    models = {resolve([f"recipe={name}"]).recipe.model.name for name in recipe_names() if name != "tiny"}
    assert {model.split("/")[-1] for model in models} == {path.parent.name for path in ARCHITECTURES} == set(SHAPES)
    sources = (recipes_dir() / "architectures" / "sources.md").read_text()
    for path in ARCHITECTURES:
        assert not {"_name_or_path", "auto_map", "quantization_config"} & set(json.loads(path.read_text()))
        assert f"`{path.parent.name}`" in sources
