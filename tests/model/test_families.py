"""What trains computes what the stock model of every family computes, with one graph for all its layers."""

import pytest
import torch

from launcher.compile.observe import Observer
from launcher.compile.plan import Plan
from launcher.compile.regions import Region
from launcher.errors import RecipeError
from launcher.model.attention import BlockFacts
from launcher.model.build import build_model
from launcher.model.families import FAMILIES, Family, family_of
from launcher.proof.parity import perturb, trainable
from launcher.proof.stock import stock_model
from launcher.recipe.schema import CompileSection, Recipe
from tests.conftest import small_config
from tests.support.models import LENGTHS, packed_batch
from tests.support.tensors import relative_error

CPU = torch.device("cpu")
LAYERS = 6  # more than the period of any pattern of layers: SmolLM3 omits positions in every fourth, Gemma 3 has six
RECIPE = Recipe.model_validate(
    {
        "model": {"init": "random", "dtype": "float32"},
        "lora": {"r": 4},
        "data": {"max_length": 20},
        "train": {"steps": 1, "micro_batch": 2},
    }
)


def build(config):
    """The model of a run, grouped projections included, its LoRA B drawn."""
    built = build_model(RECIPE, "", config, device=CPU, blocks=BlockFacts((20,), alone=False), phase=lambda _: None)
    return built, perturb(built.peft, seed=0)


def stock_loss_one_by_one(model, ids):
    """Summed token losses of all documents, each alone, by transformers' own forward; adds their gradients."""
    total = 0.0
    pieces = [ids[:1, end - size : end] for size, end in zip(LENGTHS, torch.tensor(LENGTHS).cumsum(0), strict=True)]
    for piece in (*pieces, ids[1:]):
        if piece.shape[1] > 1:
            loss = model(input_ids=piece, labels=piece).loss * (piece.shape[1] - 1)
            loss.backward()
            total += float(loss.detach())
    return total


def errors(config):
    """Relative differences of what trains from the stock model, in NF4 with LoRA: of the loss, and by adapter."""
    built, adapters = build(config)
    stock = stock_model(RECIPE, "", config, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        for name, parameter in trainable(stock):
            parameter.copy_(adapters[name])
    ids, *rest = packed_batch(config.vocab_size)
    loss = built.packed(ids, *rest)
    loss.backward()
    expected = stock_loss_one_by_one(stock, ids)
    ours, theirs = ({name: p.grad for name, p in trainable(model)} for model in (built.peft, stock))
    assert ours.keys() == theirs.keys() and expected > 10
    return abs(loss.item() / expected - 1), {name: relative_error(ours[name], theirs[name]) for name in ours}


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_what_trains_of_each_family_has_the_loss_and_gradients_of_its_stock_model_document_by_document(model_type):
    loss, gradients = errors(small_config(model_type, num_hidden_layers=LAYERS))
    assert loss < 1e-5
    assert max(gradients.values()) < 1e-3 and len(gradients) == LAYERS * 7 * 2


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("smollm3", {"pad_token_id": 0}), ("granite", {"logits_scaling": 8.0}), ("cohere", {}), ("helium", {})],
)
def test_a_row_alone_makes_no_family_of_a_model_that_computes_something_else(model_type, changes, monkeypatch):
    """As SmolLM3, whose every fourth layer has no positions: grouped attention would rotate its queries and keys."""
    monkeypatch.setitem(FAMILIES, model_type, Family(model_type))
    _, gradients = errors(small_config(model_type, num_hidden_layers=LAYERS, **changes))
    assert max(gradients.values()) > 0.1


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.usefixtures("clean_dynamo")
def test_each_family_compiles_one_train_and_one_eval_graph_for_all_layers(model_type):
    config = small_config(model_type, num_hidden_layers=LAYERS)
    built, _ = build(config)
    packed, observer = built.packed, Observer()
    compile = CompileSection(backend="aot_eager", regions=[])
    plan = Plan([Region("layer", 2, modules=tuple(packed.body.layers))], compile=compile, observer=observer)
    batch = packed_batch(config.vocab_size)

    def train_and_evaluate():
        packed.hidden_states(batch[0], *batch[2:]).sum().backward()
        with torch.no_grad():
            packed.hidden_states(batch[0], *batch[2:])

    plan.warm_up(train_and_evaluate)
    other = packed_batch(config.vocab_size, seed=1)
    plan.call(packed.hidden_states, other[0], *other[2:])
    assert observer.record().graphs_by_region == {"layer": 2}
    assert observer.record().recompiles == 0


@pytest.mark.parametrize(
    ("model_type", "changes", "max_length", "message"),
    [
        ("gpt2", {}, 8, "llama.*mistral.*qwen3.*'gpt2'"),
        ("mistral", {"sliding_window": 16}, 17, "data.max_length=16"),
        ("llama", {}, 513, "at most the model's 512 positions"),
        ("llama", {"attention_dropout": 0.1}, 8, "attention_dropout=0.1"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 8, "'dynamic'"),
    ],
)
def test_a_model_that_would_not_be_computed_as_its_config_says_is_refused(model_type, changes, max_length, message):
    with pytest.raises(RecipeError, match=message):
        family_of(small_config(model_type, **changes), max_length=max_length)


def test_a_window_does_not_limit_documents_that_fit_it_nor_a_model_that_does_not_use_it():
    assert family_of(small_config("mistral", sliding_window=16), max_length=16).model_type == "mistral"
    unused = small_config("qwen3", sliding_window=16, use_sliding_window=False)
    assert family_of(unused, max_length=64).model_type == "qwen3"
