"""What trains computes what the stock model of every family computes, with one graph for all its layers of a kind."""

import pytest
import torch
from torch.nn.attention import varlen

from launcher.model import attention, grouped, packed
from launcher.model import build as build_module
from launcher.model.attention import BlockFacts
from launcher.model.build import build_model
from launcher.model.families import FAMILIES, Family
from launcher.model.layer_kinds import layer_kinds
from launcher.model.logits import LogitsRule
from launcher.ops import document_attention
from launcher.ops.document_attention import masked_attention
from launcher.proof.first_difference import first_difference
from launcher.proof.start import start_verdict
from tests.support.family_figures import RECIPE, build, compiled, config_of, differences, reloaded
from tests.support.models import packed_batch

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_what_trains_of_each_family_has_the_loss_and_gradients_of_its_stock_model_document_by_document(model_type):
    config = config_of(model_type)
    loss, gradients = differences(config)
    assert loss < 1e-5
    projections = 4 if model_type == "phi3" else 7
    assert max(gradients.values()) < 1e-4 and len(gradients) == config.num_hidden_layers * projections * 2


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_what_trains_of_each_family_is_that_of_stock_code_in_half_precision_too(model_type):
    recipe = RECIPE.model_copy(update={"model": RECIPE.model.model_copy(update={"dtype": "bfloat16"})})
    built, _ = build(config_of(model_type), recipe)
    verdict = start_verdict(built, [torch.arange(3, 14), torch.arange(20, 29)], seed=0)
    assert verdict.holds, verdict.evidence


@pytest.mark.parametrize("model_type", ["gemma2", "granite"])
def test_divided_and_capped_logits_are_no_difference_from_stock_code(model_type):
    assert first_difference(build(config_of(model_type))[0], [[torch.arange(3, 14), torch.arange(20, 29)]]) is None


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


@pytest.mark.usefixtures("clean_dynamo")
def test_layers_with_and_without_positions_share_an_attention_core():
    _, observer = compiled(config_of("smollm3"), "regions")
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
