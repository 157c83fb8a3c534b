"""What is not trained here is refused by its part, before any weight is read; what is quantised, by its method."""

import json
from typing import Any

import pytest
import torch

from launcher.errors import RecipeError
from launcher.model import load
from launcher.model.build import check_model
from launcher.model.config_file import check_config_file
from launcher.model.layer_shape import computes_as_llama, norms_as_llama
from launcher.model.load import empty_model, random_base
from launcher.recipe.schema import QuantSection, Recipe
from tests.conftest import small_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            r"experts in place of a feed-forward \(num_local_experts=8",
        ),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "n_routed_experts=256"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder beside its decoder"),
        ({"model_type": "gemma3", "vision_config": {"hidden_size": 8}}, r"other input than text \(vision_config"),
        ({"model_type": "lfm2", "conv_L_cache": 3}, r"recurrent or convolutional layers \(conv_L_cache=3"),
        ({"model_type": "qwen3_next", "layer_types": ["linear_attention"]}, "layer_types: linear_attention"),
        ({"model_type": "x", "mamba_d_state": 16}, "mamba_d_state=16"),
        ({"model_type": "rwkv"}, "'rwkv' has recurrent layers"),
    ],
)
@pytest.mark.parametrize("auto", [True, False])
def test_a_part_that_is_not_trained_here_is_named_in_one_line_with_what_runs_it(tmp_path, config, part, auto):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=part) as raised:
        check_config_file(tmp_path / "config.json", max_length=8, auto=auto)
    message = str(raised.value)
    assert "\n" not in message and message.endswith("stock Transformers + PEFT runs it.") and "auto" not in message


def test_another_architecture_is_refused_with_the_remedy_and_taken_where_it_is_asked_for(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "helium", "hidden_size": 64}')
    with pytest.raises(RecipeError, match="this model is 'helium'.\nmodel.family=auto tries it"):
        check_config_file(tmp_path / "config.json", max_length=8)
    check_config_file(tmp_path / "config.json", max_length=8, auto=True)


def recipe(**sections: Any) -> Recipe:
    base: dict[str, Any] = {"model": {"init": "random", "family": "auto"}, "data": {"max_length": 16}}
    return Recipe.model_validate(base | {"train": {"steps": 1}} | sections)


@pytest.mark.parametrize(
    ("model_type", "changes", "says"),
    [
        ("persimmon", {}, "'persimmon' has no model.norm"),
        (
            "gpt2",
            {"n_embd": 64, "resid_pdrop": 0.0},
            "has no model.embed_tokens, model.layers, model.norm, model.rotary_emb",
        ),
        ("stablelm", {}, "cannot be called with packed documents: TypeError: attention is not told cu_seqlens"),
        ("vaultgemma", {}, "ValueError: VaultGemmaForCausalLM does not support"),
        ("seed_oss", {"residual_dropout": 0.1, "attention_dropout": 0.0}, "sets residual_dropout=0.1"),
        ("seed_oss", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("arcee", {}, "lora.targets must name linear layers of the decoder; gate_proj matched nothing"),
    ],
)
def test_a_model_without_the_common_shape_is_refused_before_weights_are_read(model_type, changes, says):
    with pytest.raises(RecipeError, match=says):
        check_model(recipe(), "", small_config(model_type, **changes), CPU)


def test_random_weights_of_a_model_with_computed_buffers_are_refused(monkeypatch):
    def with_buffer(config, **kwargs):
        model: Any = empty_model(config, **kwargs)
        model.model.norm.register_buffer("table", torch.empty(3, device="meta"))
        return model

    monkeypatch.setattr(load, "empty_model", with_buffer)
    with pytest.raises(RecipeError, match="model.norm.table of this model is computed as it is loaded"):
        random_base(small_config("llama"), quant=QuantSection(type="none"), dtype=torch.float32, device=CPU, seed=0)


def test_proof_cannot_be_switched_off_for_an_architecture_without_a_row():
    with pytest.raises(ValueError, match=r"proof.start is what model.family=auto relies on; got off"):
        recipe(proof={"start": "off"})


def test_projections_and_norms_are_replaced_only_where_the_code_is_llamas():
    computes = {}
    for model_type in ("llama", "mistral", "helium", "arcee", "qwen3"):
        model: Any = empty_model(small_config(model_type))
        computes[model_type] = computes_as_llama(model.model.layers[0]), norms_as_llama(model.model.norm)
    assert computes["llama"] == (True, True)
    assert not computes["helium"][0] and not computes["arcee"][0] and not computes["qwen3"][0]
    assert computes["qwen3"][1]


LLAMA = {"model_type": "llama", "hidden_size": 64}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised as 'gptq'.\nName the unquantised checkpoint in model.name"),
        ({"quant_method": "awq"}, "'awq'"),
        ({"quant_method": "fp8"}, r"'fp8'(?s:.*)FineGrainedFP8Config\(dequantize=True\)\).save_pretrained"),
        ({"quant_method": "mxfp4"}, r"'mxfp4'(?s:.*)Mxfp4Config\(dequantize=True\)"),
        ({"quant_method": "compressed-tensors"}, r"'compressed-tensors'(?s:.*)run_compressed=False"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "'bitsandbytes 8-bit'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "'fp4'"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False},
            "Set quant.double=false",
        ),
    ],
)
def test_a_quantised_checkpoint_is_refused_by_its_method_before_torch_is_imported(tmp_path, settings, says):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA | {"quantization_config": settings}))
    with pytest.raises(RecipeError, match=says):
        check_config_file(file, max_length=8, quant=QuantSection())
    check_config_file(file, max_length=8)  # of random weights nothing is loaded
    file.write_text(json.dumps(LLAMA | {"compression_config": settings}))
    with pytest.raises(RecipeError, match=says):
        check_config_file(file, max_length=8, quant=QuantSection())


def test_what_the_run_quantises_or_finds_quantised_as_asked_passes(tmp_path):
    file = tmp_path / "config.json"
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    for settings in (None, nf4):
        file.write_text(json.dumps(LLAMA | {"quantization_config": settings}))
        check_config_file(file, max_length=8, quant=QuantSection())
