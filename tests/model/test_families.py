"""What trains computes what the stock model of every family computes, with one graph for all its layers of a kind."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import varlen

from launcher.errors import RecipeError
from launcher.model import attention, grouped, packed
from launcher.model import build as build_module
from launcher.model.attention import BlockFacts, choose_attention
from launcher.model.build import build_model
from launcher.model.families import FAMILIES, Family
from launcher.model.family_choice import family_of
from launcher.model.layer_kinds import AttentionNeeds, attention_needs, layer_kinds
from launcher.model.load import empty_model
from launcher.model.logits import LogitsRule
from launcher.model.lora_targets import fitted_targets
from launcher.ops import document_attention
from launcher.ops.document_attention import masked_attention
from launcher.recipe.schema import LoraSection
from tests.conftest import small_config
from tests.support.family_figures import RECIPE, build, compiled, config_of, differences, reloaded
from tests.support.models import packed_batch

CPU = torch.device("cpu")
TARGETS = LoraSection().targets


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_what_trains_of_each_family_has_the_loss_and_gradients_of_its_stock_model_document_by_document(model_type):
    config = config_of(model_type)
    loss, gradients = differences(config)
    assert loss < 1e-5
    projections = 4 if model_type == "phi3" else 7
    assert max(gradients.values()) < 1e-4 and len(gradients) == config.num_hidden_layers * projections * 2


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "phi3"])
def test_lora_dropout_which_keeps_projections_apart_changes_no_evaluated_loss(model_type):
    """Dropout keeps every stock forward: the layers' own code for biases, windows and caps."""
    config, losses = config_of(model_type), []
    for dropout in (0.0, 0.5):
        recipe = RECIPE.model_copy(update={"lora": RECIPE.lora.model_copy(update={"dropout": dropout})})
        built, _ = build(config, recipe)
        with torch.no_grad():
            losses.append(float(built.packed(*packed_batch_of(config))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def packed_batch_of(config):
    return packed_batch(config.vocab_size)


def without_windows(config, *, max_length):
    return tuple(kind._replace(window=None) for kind in layer_kinds(config, max_length=max_length))


def with_one_table(config, *, max_length):
    return tuple(kind._replace(table="full_attention") for kind in layer_kinds(config, max_length=max_length))


def narrower(mask, window):
    return document_attention.within_window(mask, window - 1)


def uncapped(query, key, value, limits, scale):
    return masked_attention(query, key, value, limits[0], scale)


def without_biases(x, projections):
    return grouped.joined_linears(x, *grouped._weights(projections), scaling=8.0)  # alpha 32, r 4


def with_positions(layers, *, mlp):
    for layer in layers:
        layer.self_attn.use_rope = 1
    return grouped.group_projections(layers, mlp=mlp)


FAULTS = {  # what is left out, by the mechanism
    "window of a mask": ("mistral", packed, "layer_kinds", without_windows),
    "window of one token less": ("mistral", packed, "within_window", narrower),
    "local and global layers": ("gemma3_text", packed, "layer_kinds", without_windows),
    "two rotary tables": ("gemma3_text", packed, "layer_kinds", with_one_table),
    "cap of scores": ("gemma2", attention, "CORES", {**attention.CORES, "capped": uncapped}),
    "cap of logits": ("gemma2", packed, "logits_rule", lambda config: LogitsRule(None, None)),
    "divisor of logits": ("granite", packed, "logits_rule", lambda config: LogitsRule(None, None)),
    "biases of grouped projections": ("qwen2", grouped, "_joined", without_biases),
    "norms of query and key": ("olmo2", grouped, "_normed", lambda part, name, m: part.unflatten(-1, (-1, m.head_dim))),
    "layers without positions": ("smollm3", build_module, "group_projections", with_positions),
}


@pytest.mark.parametrize("mechanism", FAULTS)
def test_a_mechanism_that_is_left_out_changes_the_gradients(mechanism, monkeypatch):
    model_type, module, name, fault = FAULTS[mechanism]
    monkeypatch.setattr(module, name, fault)
    _, gradients = differences(config_of(model_type))
    assert max(gradients.values()) > 0.03


def test_an_embedding_multiplier_that_is_left_out_changes_the_loss():
    config = config_of("granite")
    built, _ = build(config)
    batch = packed_batch_of(config)
    with torch.no_grad():
        right = float(built.packed(*batch))
        built.packed.embedding_multiplier = 1.0
        assert abs(float(built.packed(*batch)) / right - 1) > 1e-3


@pytest.mark.parametrize(("model_type", "changes"), [("cohere", {}), ("helium", {})])
def test_a_row_alone_makes_no_family_of_a_model_that_computes_something_else(model_type, changes, monkeypatch):
    """They rotate neighbouring features, where grouped attention rotates those half a head apart."""
    monkeypatch.setitem(FAMILIES, model_type, Family(model_type))
    _, gradients = differences(config_of(model_type, **changes))
    assert max(gradients.values()) > 0.1


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.usefixtures("clean_dynamo")
def test_each_family_compiles_one_train_and_one_eval_graph_for_all_layers_of_a_kind(model_type):
    kinds, observer = compiled(config_of(model_type))
    assert kinds == (2 if model_type == "smollm3" else 1)
    assert observer.record().graphs_by_region == {"layer": 2 * kinds, "loss": 2}
    assert observer.record().recompiles == 0


@pytest.mark.usefixtures("clean_dynamo")
def test_the_norms_of_a_sandwich_and_the_capped_core_share_a_graph_each():
    _, observer = compiled(config_of("gemma2"), "regions")
    assert observer.record().graphs_by_region == {"attention": 2, "loss": 2, "mlp": 2, "rmsnorm": 2}


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_saved_adapter_has_the_trained_loss_in_stock_peft(model_type):
    assert reloaded(config_of(model_type)) < 1e-5


def test_variable_length_attention_is_given_each_layers_window_and_plans_a_graph_for_each(monkeypatch):
    """The kernel runs on CUDA alone; here it is replaced by one that notes its window."""
    windows = []

    def kernel(q, k, v, *lengths, window_size, scale, **options):
        windows.append(window_size)
        return q

    monkeypatch.setattr(document_attention, "varlen_attn", kernel)
    monkeypatch.setattr(document_attention, "TAKES_GROUPED_HEADS", True)
    monkeypatch.setattr("launcher.model.build.choose_attention", lambda *_, **__: ("varlen", "for the test"))
    config = config_of("ministral")
    blocks = BlockFacts((20,), alone=False)
    built = build_model(RECIPE, "", config, device=CPU, blocks=blocks, phase=lambda _: None)
    assert len(set(built.packed.layer_code())) == 2
    built.packed(*packed_batch_of(config))
    assert windows == [(3, 0), (-1, 0)] * 2  # a window of 4 tokens is the token and 3 before it
    assert "window_size" in varlen.varlen_attn.__code__.co_varnames


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
