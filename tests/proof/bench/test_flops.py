"""The formula against what torch counts while a stock model runs forward and backward."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.model.lora import stock_lora
from launcher.proof.bench.flops import ModelFlops, model_flops
from launcher.recipe.lora_section import LoraSection
from tests.conftest import ROOT, small_config

ROWS, LENGTH = 2, 24


def counted(config: Any, lora: LoraSection) -> int:
    """Forward and backward of [ROWS, LENGTH] tokens; eager attention computes every pair, masked ones too."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    peft = stock_lora(model, lora, seed=0)
    peft.enable_input_require_grads()  # as ours: the first layer's input has a gradient too
    with FlopCounterMode(display=False) as counter:
        peft(input_ids=torch.zeros(ROWS, LENGTH, dtype=torch.long)).logits.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    ("model_type", "lora"),
    [
        ("llama", LoraSection(r=4)),
        ("llama", LoraSection(r=32, targets=["q_proj", "down_proj"])),
        ("qwen3", LoraSection(r=4)),
    ],
)
def test_the_formula_counts_what_torch_counts(model_type: str, lora: LoraSection) -> None:
    config = small_config(model_type)
    flops = model_flops(config, lora)
    every_pair = flops.per_pair * ROWS * LENGTH**2
    assert (flops.per_token + flops.per_target) * ROWS * LENGTH + every_pair == counted(config, lora)
    assert flops.per_pair > 0
    assert flops.per_target == 4 * config.hidden_size * config.vocab_size


def test_a_position_attends_to_itself_and_those_before_it_in_its_document() -> None:
    flops = ModelFlops(per_token=100, per_target=1000, per_pair=1)
    assert flops.of([1], targets=0) == 101
    assert flops.of([3, 2], targets=3) == 500 + 3000 + (1 + 2 + 3) + (1 + 2)
    assert flops.of([5], targets=3) > flops.of([3, 2], targets=3)
    assert flops.of([], targets=0) == 0


def test_the_1b_shape_costs_what_its_published_parameters_say() -> None:
    """4 FLOPs for each of the 1.236e9 parameters of linears and head, and LoRA's 3 * 2 for each of its 11.3e6."""
    config = AutoConfig.from_pretrained(next((ROOT / "recipes" / "architectures").glob("*1B*")))
    flops = model_flops(config, LoraSection(r=16))
    assert flops.per_token + flops.per_target == pytest.approx(4 * 1.2358e9 + 6 * 11.27e6, rel=1e-3)
