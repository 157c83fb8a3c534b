"""config.json alone tells whether a model of a supported family can be built."""

import json

import pytest

from launcher.errors import RecipeError
from launcher.model.config_file import check_config_file
from tests.conftest import ROOT

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def check(folder, config):
    file = folder / "config.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    check_config_file(file, max_length=256)


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").rglob("config.json")), ids=lambda file: file.parent.name)
def test_every_shipped_model_passes(file):
    check_config_file(file, max_length=256)


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"head_dim": None, "rope_scaling": None},
        {"model_type": "qwen3", "hidden_size": 60, "head_dim": 128},  # heads need not share the hidden size
        {"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": False},
        {"num_key_value_heads": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"model_type": "mistral", "sliding_window": 8},
        {"model_type": "phi3", "rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 256},
    ],
)
def test_what_can_be_trained_passes(tmp_path, others):
    check(tmp_path, LLAMA | others)


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({"model_type": "gpt2"}, "supported are gemma2, .*, llama, .*; this model is 'gpt2'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number from 1 to"),
        ({"num_attention_heads": "4"}, "it is '4'"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers must be a whole number from 1 to 1,000; it is 1000000"),
        ({"vocab_size": -1}, "vocab_size must be"),
        ({"vocab_size": True}, "vocab_size must be"),
        ({"hidden_size": 64.0}, "hidden_size must be"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads; they are 4 and 3"),
        ({"hidden_size": 66}, "an even head_dim.*it is 16.5"),
        ({"head_dim": 15}, "an even head_dim.*it is 15"),
        ({"max_position_embeddings": 128}, "data.max_length may be at most the model's 128 positions"),
        ({"rope_scaling": {"type": "spiral"}}, "rotary embeddings must be of a kind"),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 64}, "longrope.*\n.*data.max_length=64"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"model_type": None}, "as model_type"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(tmp_path, others, says):
    with pytest.raises(RecipeError, match=says):
        check(tmp_path, LLAMA | others)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"model_type": 5}', "\udcff"])
def test_a_file_that_is_no_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RecipeError, match="config.json"):
        check_config_file(tmp_path / "config.json", max_length=256)
