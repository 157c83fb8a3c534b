"""Models whose adapters start from the base's weights, moved from there; their packed and their stock loss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.model.family_choice import family_of
from launcher.model.grouped import group_projections
from launcher.model.load import random_base
from launcher.model.lora import attach_lora
from launcher.recipe.lora_section import LoraSection
from launcher.recipe.schema import QuantSection
from tests.conftest import small_config
from tests.support.models import packed_batch, packed_form

VARIANTS: dict[str, dict[str, Any]] = {
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora", "rslora": True},
    "patterns": {
        "init": "pissa", "rslora": True, "layers": ["1-2"],
        "rank_pattern": {"down_proj": 2, r"layers\.2\.self_attn\.q_proj": 6}, "alpha_pattern": {"[qkv]_proj": 5.0},
    },
}  # fmt: skip


def base_model(quant: str = "nf4", dtype: torch.dtype = torch.float32) -> Any:
    return random_base(
        small_config(num_hidden_layers=3),
        quant=QuantSection(type=quant),
        dtype=dtype,
        device=torch.device("cpu"),
        seed=0,
    )


def ours(lora: dict[str, Any], *, quant: str = "nf4", dtype: torch.dtype = torch.float32) -> Any:
    base = base_model(quant, dtype)
    section = LoraSection(**{"r": 4, **lora})
    peft = attach_lora(base, section, seed=0, token_ids=tuple(map(int, section.trainable_tokens)))
    group_projections(base.model.layers, mlp=family_of(base.config, max_length=20).mlp)
    return peft


def packed_loss(peft: Any) -> Tensor:
    """Of our forward, summed."""
    torch.manual_seed(0)
    base = peft.base_model.model
    return packed_form(base)(*packed_batch(base.config.vocab_size))


def alone_loss(model: Any) -> Tensor:
    """Of the model's own forward, document by document, summed."""
    ids, labels, _, documents, _ = packed_batch(model.config.vocab_size)
    total = torch.zeros(())
    for row, its_labels, numbers in zip(ids, labels, documents, strict=True):
        for number in numbers.unique():
            where = numbers == number
            logits = model(input_ids=row[where][None]).logits[0]
            total = total + F.cross_entropy(logits, its_labels[where], ignore_index=-100, reduction="sum").nan_to_num()
    return total


def noise(name: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator) * 0.02


@torch.no_grad()
def moved(peft: Any, by: float = 1.0) -> Any:
    """The model with everything that is trained moved, as `noise` says by name, times `by`."""
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            parameter.add_(by * noise(name, parameter.shape))
    return peft
