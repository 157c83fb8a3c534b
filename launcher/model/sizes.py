"""The sizes of a model before it is built, from its empty form: adapters, weights, and what decides a step's memory."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from launcher.model.attention import MASKED
from launcher.model.families import head_width
from launcher.model.logits import logit_bytes, logits_rule
from launcher.model.lora_targets import adapted_linears
from launcher.model.weight_files import linear_weights
from launcher.ops.nf4 import BLOCK, BLOCK2
from launcher.recipe.lora_section import LoraSection
from launcher.recipe.schema import QuantSection


def adapter_parameters(model: nn.Module, lora: LoraSection) -> int:
    """Parameters of all adapters that are trained, and of the rows of trained tokens: of the embedding, and of a head
    of its own."""
    config: Any = model.config
    rows = len(lora.trainable_tokens) * (1 if config.tie_word_embeddings else 2)
    return sum(one.parameters for one in adapted_linears(model, lora).values()) + rows * config.hidden_size


def kept_by_adapters(linears: Iterable[Any], lora: LoraSection) -> int:
    """Features that the adapters of these linears keep besides: under dropout inputs of their own, and for DoRA's
    magnitudes the outputs before they are scaled."""
    return sum((one.in_features if lora.dropout else 0) + (one.out_features if lora.dora else 0) for one in linears)


def weight_bytes(model: nn.Module, quant: QuantSection, dtype: torch.dtype) -> int:
    """Bytes of the base as it is trained: the linears of its layers in NF4 with their scales, if they are quantised,
    and the rest in `dtype`."""
    linears = linear_weights(model) if quant.type == "nf4" else {}
    return sum(
        _nf4_bytes(parameter.numel(), double=quant.double) if name in linears else parameter.numel() * dtype.itemsize
        for name, parameter in model.named_parameters()
    )


def _nf4_bytes(elements: int, *, double: bool) -> int:
    blocks = -(-elements // BLOCK)
    return elements // 2 + (blocks + 4 * -(-blocks // BLOCK2) if double else 4 * blocks)


def step_sizes(config: Any, *, attention: str, dtype: torch.dtype, loss_chunk: int, trainable: int) -> dict[str, int]:
    """What decides how much memory a token of a micro batch takes, as memory/forecast.py's Shapes names it."""
    head = head_width(config)
    query, key_value = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "query": query,
        "key_value": key_value,
        "repeated": 2 * (query - key_value) if attention in (*MASKED, "causal") else 0,
        "intermediate": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "scores": config.num_attention_heads if attention == "capped" else 0,
        "loss_chunk": loss_chunk,
        "logit_bytes": logit_bytes(logits_rule(config), dtype),
        "itemsize": dtype.itemsize,
        "trainable": trainable,
    }
