"""Grouped projections compute what separate ones compute, in every family."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.model.families import FAMILIES
from launcher.model.family_choice import family_of
from launcher.model.grouped import group_projections
from launcher.model.load import random_base
from launcher.model.lora import attach_lora
from launcher.recipe.lora_section import LoraSection
from launcher.recipe.schema import QuantSection
from tests.conftest import small_config
from tests.support.family_figures import config_of
from tests.support.models import packed_batch, packed_form

CPU = torch.device("cpu")


def adapted(config, *, quant="nf4", **lora):
    """A small random model of the family with adapters whose B is not zero."""
    base = random_base(config, quant=QuantSection(type=quant), dtype=torch.float32, device=CPU, seed=0)
    peft = attach_lora(base, LoraSection(r=4, **lora), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5, generator=generator)
    return base, peft


def loss_and_gradients(base, peft):
    loss = packed_form(base)(*packed_batch(base.config.vocab_size))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in peft.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_grouped_projections_have_the_loss_and_the_gradients_of_separate_ones(model_type):
    runs = []
    for grouped in (False, True):
        base, peft = adapted(config_of(model_type))
        names = [name for name, _ in peft.named_modules()]
        if grouped:
            family = family_of(base.config, max_length=20)
            modules = {"phi3": 0, "gemma2": 1, "llama": 1}.get(model_type, 2)  # fused; capped scores; mlp_bias
            assert group_projections(base.model.layers, mlp=family.mlp) == modules * base.config.num_hidden_layers
        assert names == [name for name, _ in peft.named_modules()]
        runs.append(loss_and_gradients(base, peft))
    (loss, gradients), (grouped_loss, grouped_gradients) = runs
    torch.testing.assert_close(grouped_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(grouped_gradients, gradients, rtol=1e-3, atol=1e-5)
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("lora", "quant", "grouped"),
    [
        ({}, "nf4", 4),
        ({"dropout": 0.1}, "nf4", 0),
        ({}, "none", 0),
        ({"targets": ["q_proj", "v_proj"]}, "nf4", 0),
        ({"targets": ["gate_proj", "up_proj"]}, "nf4", 2),
    ],
)
def test_only_nf4_projections_with_equal_adapters_are_grouped(lora, quant, grouped):
    base, _ = adapted(small_config("llama"), quant=quant, **lora)
    before = [type(layer.mlp) for layer in base.model.layers]
    assert group_projections(base.model.layers, mlp="mlp") == grouped
    assert ([type(layer.mlp) for layer in base.model.layers] == before) == (grouped == 0)


def test_all_layers_share_one_class_which_is_a_subclass_of_the_stock_one():
    base, _ = adapted(small_config("llama"))
    stock = AutoModelForCausalLM.from_config(small_config("llama")).model.layers[0]
    group_projections(base.model.layers, mlp="mlp")
    assert len({type(layer.self_attn) for layer in base.model.layers}) == 1
    assert isinstance(base.model.layers[0].self_attn, type(stock.self_attn))


def test_a_stock_forward_of_several_sequences_gives_what_each_gives_alone():
    base, peft = adapted(small_config("llama"))
    base.set_attn_implementation("sdpa")
    group_projections(base.model.layers, mlp="mlp")
    ids = torch.arange(24).view(3, 8) % base.config.vocab_size
    with torch.no_grad():
        together = peft(input_ids=ids).logits
        for number, alone in enumerate(peft(input_ids=one[None]).logits for one in ids):
            torch.testing.assert_close(together[number : number + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
