import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from launcher.errors import RecipeError
from launcher.model.build import choose_dtype
from launcher.model.load import load_stop_ids, load_tokenizer
from tests.conftest import TINY, small_config
from tests.support.models import build

CPU = torch.device("cpu")


def test_a_full_checkpoint_becomes_nf4_with_fp32_adapters_on_seven_projections(make_recipe, small_model):
    phases = []
    built = build(make_recipe(), phases)
    quantised = [m for m in built.peft.modules() if isinstance(m, Linear4bit)]
    assert len(quantised) == 7 * 2
    assert all(m.weight.quant_type == "nf4" and m.weight.quant_state.nested for m in quantised)
    trainable = {n: p for n, p in built.peft.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 7 * 2
    assert all(p.dtype == torch.float32 and "lora_" in n for n, p in trainable.items())
    assert built.trainable == sum(p.numel() for p in trainable.values())
    assert phases == ["after load", "after adapters"]
    assert built.quantization == "nf4, double quantised"
    full = AutoModelForCausalLM.from_pretrained(small_model)  # the base is counted unpacked
    assert built.parameters == sum(p.numel() for p in full.parameters()) + built.trainable


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])  # of the packed weights; FSDP needs bfloat16
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_checkpoint_quantised_for_bf16_keeps_its_weights_and_computes_in_the_runs_dtype(
    make_recipe, small_model, tmp_path, dtype, storage
):
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=storage
    )
    saved = AutoModelForCausalLM.from_pretrained(
        small_model, quantization_config=quantisation, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    saved.save_pretrained(tmp_path / "for-bf16")
    built = build(make_recipe(model={"name": str(tmp_path / "for-bf16"), "dtype": dtype}))
    frozen = [p for p in built.packed.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen if not isinstance(p, Params4bit)} == {getattr(torch, dtype)}
    packed = [
        [p.data.view(torch.uint8) for p in ps if isinstance(p, Params4bit)] for ps in (saved.parameters(), frozen)
    ]
    assert len(packed[0]) == 14
    assert all(torch.equal(before, after) for before, after in zip(*packed, strict=True))
    assert "as the checkpoint came" in built.quantization


def test_a_checkpoint_quantised_in_another_way_is_refused(make_recipe, tmp_path):
    fp4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    small_config(quantization_config=fp4).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="already quantised as 'fp4'"):
        build(make_recipe(model={"name": str(tmp_path)}))


def test_quant_none_leaves_the_base_as_it_is(make_recipe):
    built = build(make_recipe(quant={"type": "none"}))
    assert not any(isinstance(m, Linear4bit) for m in built.peft.modules())
    assert built.quantization == "none"


@pytest.fixture
def bare(tmp_path):
    """The model section of random weights for a folder that has a config and nothing else."""
    small_config().save_pretrained(tmp_path / "bare")
    return {"name": str(tmp_path / "bare"), "init": "random"}


def test_random_weights_need_only_a_config_and_follow_the_seed(make_recipe, bare):
    one, same, other = (build(make_recipe(model=bare, train={"seed": seed})) for seed in (0, 0, 1))
    weights = [b.packed.body.layers[0].mlp.up_proj.base_layer.weight for b in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not any(p.is_meta for p in one.peft.parameters())
    assert not any(b.is_meta for b in one.peft.buffers())


def test_random_and_loaded_models_differ_only_in_their_values(make_recipe, bare):
    random, loaded = build(make_recipe(model=bare)), build(make_recipe())
    names = [{n: (p.shape, p.dtype, p.requires_grad) for n, p in b.peft.named_parameters()} for b in (random, loaded)]
    assert names[0] == names[1]
    assert random.packed.head.weight is random.packed.embed.weight or not random.peft.config.tie_word_embeddings


@pytest.mark.parametrize("target", ["query", "lm_head"])  # the loss reads the head directly
def test_a_lora_target_without_a_match_is_named_with_the_targets_there_are(make_recipe, target):
    with pytest.raises(RecipeError, match=rf"(?s){target} matched nothing.*q_proj") as caught:
        build(make_recipe(lora={"targets": ["q_proj", target]}))
    assert caught.value.code == 2


def test_random_weights_take_the_tiny_tokenizer_where_the_config_has_none(make_recipe, bare):
    assert load_tokenizer(bare["name"], make_recipe(model=bare).model, stand_in=TINY / "base").chat_template


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"eos_token_id": [3, 5]}, (3, 5)),
        ({"eos_token_id": 3}, (3,)),
        ({"eos_token_id": None}, ()),
        ({}, ()),
        (None, ()),
    ],
)
def test_stop_tokens_are_those_of_generation_config_json(make_recipe, tmp_path, content, found):
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert load_stop_ids(str(tmp_path), make_recipe().model) == found


@pytest.mark.parametrize("damaged", ["{", "[1]", '{"eos_token_id": ["</s>"]}', '{"eos_token_id": {"a": 1}}'])
def test_a_damaged_generation_config_is_named_with_the_remedy(make_recipe, tmp_path, damaged):
    (tmp_path / "generation_config.json").write_text(damaged)
    with pytest.raises(
        RecipeError, match=r"(?s)generation_config.json of .*token ids in eos_token_id.*\nRepair the file"
    ):
        load_stop_ids(str(tmp_path), make_recipe().model)


def test_auto_dtype_is_float32_on_a_cpu():
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16


def test_variable_length_attention_on_a_cpu_is_refused(make_recipe):
    with pytest.raises(RecipeError, match="model.attention=auto"):
        build(make_recipe(model={"attention": "varlen"}))
