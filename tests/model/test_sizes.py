"""The sizes that are told before a model is built are those of the built one."""

from typing import Any

import pytest
import torch

from launcher.model.build import check_model
from launcher.model.load import empty_model, load_config
from launcher.model.lora_start import start_parameters
from launcher.model.lora_targets import adapted_linears
from launcher.model.sizes import adapter_parameters, weight_bytes
from launcher.preflight.space import planned_shapes
from launcher.recipe.schema import Recipe
from tests.support.models import ARCHITECTURES, build

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"quant": {"double": False}, "lora": {"targets": ["q_proj", "down_proj"], "dropout": 0.1}},
        {"lora": {"layers": ["1"], "rank_pattern": {"down_proj": 2}, "targets": ["all-linear"], "dropout": 0.1}},
        {"lora": {"init": "pissa", "rank_pattern": {"down_proj": 2}}},
        {"quant": {"type": "none"}, "model": {"dtype": "bfloat16"}, "data": {"batching": "padded"}},
        {"lora": {"trainable_tokens": ["4", "17"]}},
    ],
    ids=["nf4", "single", "chosen layers", "pissa", "none", "trained tokens"],
)
def test_parameters_weights_and_shapes_are_those_of_the_built_model(make_recipe: Any, sections: dict[str, Any]) -> None:
    recipe = make_recipe(**sections)
    source = recipe.model.name
    config = load_config(source, recipe.model)
    model = check_model(recipe, source, config, CPU)
    built = build(recipe)
    assert adapter_parameters(model, recipe.lora) == built.trainable
    held, starts = 0, start_parameters(built.packed)
    for name, parameter in built.packed.named_parameters():
        if parameter.requires_grad or name in starts:
            continue
        held += parameter.nbytes
        if (state := getattr(parameter, "quant_state", None)) is not None:
            held += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    assert weight_bytes(model, recipe.quant, built.dtype) == held
    shapes, held_mib = planned_shapes(recipe, config, model, CPU)
    sizes = built.sizes()
    assert {name: getattr(shapes, name) for name in sizes} == sizes
    frozen = sum(parameter.numel() for parameter in starts.values())
    assert bool(frozen) == (recipe.lora.init == "pissa")
    assert held_mib == (held + 4 * (built.trainable + frozen)) / 2**20


def test_a_tied_embedding_counts_once() -> None:
    recipe = Recipe.model_validate({"train": {"steps": 1}})
    model = empty_model(load_config(str(ARCHITECTURES / "Llama-3.2-1B-Instruct"), recipe.model))
    assert len(adapted_linears(model, recipe.lora)) == 7 * 16
    assert adapter_parameters(model, recipe.lora) == 11_272_192
    assert round(weight_bytes(model, recipe.quant, torch.bfloat16) / 2**20) == 980
