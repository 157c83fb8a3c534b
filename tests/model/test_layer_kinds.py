"""What a config says of its layers: windows, rotary tables, paths of attention, projections; what is refused."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from launcher.errors import RecipeError
from launcher.model import attention
from launcher.model.attention import choose_attention
from launcher.model.family_choice import family_of
from launcher.model.layer_kinds import AttentionNeeds, attention_needs, layer_kinds
from launcher.model.load import empty_model
from launcher.model.lora_targets import fitted_targets
from launcher.recipe.schema import LoraSection
from tests.conftest import small_config
from tests.support.family_figures import build, config_of, differences

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TARGETS = LoraSection().targets


@pytest.mark.parametrize(
    ("wanted", "needs", "alone", "path"),
    [
        ("auto", AttentionNeeds(softcap=True), False, "capped"),
        ("sdpa", AttentionNeeds(softcap=True), True, "capped"),
        ("auto", AttentionNeeds(window=True), True, "sdpa"),
        ("auto", AttentionNeeds(), True, "causal"),
    ],
)
def test_a_path_of_attention_is_chosen_that_does_what_the_model_needs(wanted, needs, alone, path):
    assert choose_attention(wanted, CPU, torch.float32, alone=alone, head=16, needs=needs)[0] == path


@pytest.mark.parametrize(
    ("wanted", "needs", "message"),
    [
        ("causal", AttentionNeeds(softcap=True), "attn_logit_softcapping.*model.attention=auto"),
        ("causal", AttentionNeeds(window=True), "sliding window.*data.max_length"),
    ],
)
def test_a_path_that_cannot_do_what_the_model_needs_is_refused(wanted, needs, message):
    with pytest.raises(RecipeError, match=message):
        choose_attention(wanted, CPU, torch.float32, alone=True, head=16, needs=needs)


def test_capped_scores_are_not_given_to_variable_length_attention():
    needs = attention_needs(config_of("gemma2"), max_length=20)
    with pytest.raises(RecipeError, match="model.attention=varlen has no cap"):
        attention.check_needs("varlen", needs)


def test_the_default_targets_of_a_model_with_fused_projections_are_these_and_it_is_said():
    built, _ = build(config_of("phi3"))
    wanted = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert set(built.peft.peft_config["default"].target_modules) == wanted
    assert built.notes == (
        "lora.targets: qkv_proj stands for q_proj, k_proj, v_proj, which it holds",
        "lora.targets: gate_up_proj stands for gate_proj, up_proj, which it holds",
    )


def test_a_part_alone_of_a_fused_projection_is_no_target_and_separate_ones_stay_themselves():
    fused, separate = (empty_model(config_of(name)) for name in ("phi3", "llama"))
    assert fitted_targets(fused, ["q_proj", "v_proj"]) == ["q_proj", "v_proj"]
    assert fitted_targets(separate, TARGETS) == TARGETS


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("model_type", "changes", "max_length", "message"),
    [
        ("gpt2", {}, 8, "llama.*mistral.*qwen3.*'gpt2'"),
        ("llama", {}, 513, "at most the model's 512 positions"),
        ("llama", {"attention_dropout": 0.1}, 8, "attention_dropout=0.1"),
        ("phi3", {"resid_pdrop": 0.1, "pad_token_id": 0}, 8, "resid_pdrop=0.1"),
        ("gemma3_text", {"use_bidirectional_attention": True}, 8, "must be causal"),
        ("mistral", {"sliding_window": 0}, 8, "sliding window.*sets 0"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, 8, "chunked_attention"),
        (
            "phi3",
            {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8, "pad_token_id": 0},
            9,
            "data.max_length=8",
        ),
    ],
)
def test_a_model_that_would_not_be_computed_as_its_config_says_is_refused(model_type, changes, max_length, message):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    if "rope_parameters" in changes:
        changes = {**changes, "rope_parameters": {**changes["rope_parameters"], **factors}}
    with pytest.raises(RecipeError, match=message):
        family_of(small_config(model_type, **changes), max_length=max_length)


def test_a_rotary_table_of_an_unknown_kind_is_refused():
    config = SimpleNamespace(model_type="llama", rope_parameters={"rope_type": "spiral"})
    with pytest.raises(RecipeError, match="longrope; this model uses 'spiral'"):
        family_of(config, max_length=8)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "dynamic"])
def test_scaled_rotary_tables_are_those_of_the_stock_model(kind):
    extra = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8, **extra}
    loss, gradients = differences(config_of("llama", rope_parameters=rope))
    assert loss < 1e-5 and max(gradients.values()) < 1e-4


def test_a_window_counts_only_where_documents_may_be_longer_and_the_model_uses_it():
    windows = partial(layer_kinds, max_length=17)
    assert {kind.window for kind in windows(small_config("mistral", sliding_window=16))} == {16}
    assert {kind.window for kind in windows(small_config("mistral", sliding_window=17))} == {None}
    unused = small_config("qwen3", sliding_window=16, use_sliding_window=False)
    assert {kind.window for kind in windows(unused)} == {None}
