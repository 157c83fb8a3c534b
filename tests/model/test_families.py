"""A packed model of every family computes what the stock model computes, with one graph for all its layers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.compile.observe import Observer
from launcher.compile.plan import Plan
from launcher.compile.regions import Region
from launcher.errors import RecipeError
from launcher.model.families import FAMILIES, family_of
from launcher.recipe.schema import CompileSection
from tests.conftest import small_config
from tests.support.models import LENGTHS, packed_batch, packed_form


def build(model_type, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(small_config(model_type, **changes)).requires_grad_(False)


def stock_loss_one_by_one(model, ids):
    """Summed token losses of all documents, each alone, by transformers' own forward."""
    total, start = 0.0, 0
    for size in LENGTHS:
        if size > 1:
            piece = ids[:1, start : start + size]
            total += float(model(input_ids=piece, labels=piece).loss) * (size - 1)
        start += size
    return total + float(model(input_ids=ids[1:], labels=ids[1:]).loss) * 19


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_packed_loss_of_each_family_equals_its_stock_model_document_by_document(model_type):
    model = build(model_type)
    ids, *rest = packed_batch(model.config.vocab_size)
    with torch.no_grad():
        expected = stock_loss_one_by_one(model, ids)
        loss = float(packed_form(model)(ids, *rest))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert loss > 10


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.usefixtures("clean_dynamo")
def test_each_family_compiles_one_train_and_one_eval_graph_for_all_layers(model_type):
    model = build(model_type, num_hidden_layers=3)
    packed, observer = packed_form(model), Observer()
    compile = CompileSection(backend="aot_eager", regions=[])
    plan = Plan([Region("layer", 2, modules=tuple(packed.body.layers))], compile=compile, observer=observer)
    batch = packed_batch(model.config.vocab_size)

    def train_and_evaluate():
        packed.hidden_states(batch[0], *batch[2:]).sum().backward()
        with torch.no_grad():
            packed.hidden_states(batch[0], *batch[2:])

    plan.warm_up(train_and_evaluate)
    other = packed_batch(model.config.vocab_size, seed=1)
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
