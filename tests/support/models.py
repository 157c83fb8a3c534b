"""Small models, and a packed batch for them."""

from typing import Any

import torch
from torch import Tensor

from launcher.model.attention import BlockFacts, attention_name, register_attention
from launcher.model.build import BuiltModel, build_model, check_model
from launcher.model.layer_kinds import attention_needs
from launcher.model.load import load_config
from launcher.model.packed import PackedCausalLM
from launcher.recipe.locate import locate
from tests.conftest import ROOT

ARCHITECTURES = ROOT / "recipes" / "architectures"
LENGTHS = (5, 1, 9)  # documents of block 0 of `packed_batch`; the rest of its positions is padding


def build(recipe: Any, phases: list[str] | None = None, *, device: str = "cpu") -> BuiltModel:
    """The model of `recipe`, for blocks of 64; `phases` gets the names of the phases that take memory."""
    source = locate(recipe.model, ARCHITECTURES)
    config, where = load_config(source, recipe.model), torch.device(device)
    check_model(recipe, source, config, where)
    phase = (phases if phases is not None else []).append
    blocks, ids = BlockFacts((64,), alone=False), tuple(map(int, recipe.lora.trainable_tokens))
    return build_model(recipe, source, config, device=where, blocks=blocks, phase=phase, token_ids=ids)


def packed_form(model: Any) -> PackedCausalLM:
    """The model for the blocks of `packed_batch`, with attention that runs on every device."""
    path = "capped" if attention_needs(model.config, max_length=20).softcap else "sdpa"
    register_attention(path)
    model.set_attn_implementation(attention_name(path))
    return PackedCausalLM(model, attention=path, max_length=20, loss_chunk=20)


def packed_batch(vocabulary: int, *, length: int = 20, seed: int = 0) -> tuple[Tensor, ...]:
    """PackedCausalLM's arguments for two blocks: one of documents of LENGTHS, one of a single document."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (2, length), generator=generator)
    labels = torch.full((2, length), -100)
    positions, documents = torch.arange(length).repeat(2, 1), torch.zeros(2, length, dtype=torch.int32)
    start = 0
    for number, size in enumerate((*LENGTHS, length - sum(LENGTHS))):
        positions[0, start : start + size] = torch.arange(size)
        documents[0, start : start + size] = number
        if number < len(LENGTHS):
            labels[0, start : start + size - 1] = ids[0, start + 1 : start + size]
        start += size
    labels[1, :-1] = ids[1, 1:]
    boundaries = torch.tensor([0, 5, 6, 15, 20, 40], dtype=torch.int32)
    return ids, labels, positions, documents, boundaries
