"""Attention and feed-forward modules that pass several projections to one operator: those of one input
(ops/qlora_linear.py), or all three of a feed-forward module (ops/feed_forward.py).

Otherwise they are transformers' own: same submodules, same names, same order of operations. A module becomes an
instance of a subclass with another forward where all its grouped projections are NF4, have adapters of one rank and
scale, no dropout, and no bias but those of query, key and value. Where they are not, it stays as it is; so does
attention with capped scores.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from launcher.model.lora import ADAPTER, QDoraLinear4bit, QLoraLinear4bit, nf4_of
from launcher.model.lora_start import start_factors
from launcher.ops.dora_feed_forward import dora_gated_feed_forward
from launcher.ops.dora_linears import dora_linears
from launcher.ops.feed_forward import gated_feed_forward
from launcher.ops.nf4 import Nf4
from launcher.ops.qlora_linear import joined_linears
from launcher.ops.rotary import rotary

ATTENTION = ("q_proj", "k_proj", "v_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def group_projections(layers: nn.ModuleList, *, mlp: str) -> int:
    """Group the projections of every layer's attention, and of its feed-forward module named `mlp`, in place; returns
    how many of these modules were changed."""
    grouped = 0
    for layer in layers:
        for name, choose_forward in (("self_attn", _attention_forward), (mlp, _feed_forward_forward)):
            module = getattr(layer, name)
            forward = choose_forward(module)
            if forward is not None:
                module.__class__ = _subclass(module.__class__, forward)
                grouped += 1
    return grouped


@contextmanager
def ungrouped(layers: nn.Module) -> Iterator[None]:
    """Inside, each projection in `layers` is called by itself, as transformers' own forward does it."""
    grouped = [(module, type(module)) for module in layers.modules() if type(module).__module__ == __name__]
    try:
        for module, own in grouped:
            module.__class__ = own.__bases__[0]
        yield
    finally:
        for module, own in grouped:
            module.__class__ = own


def _attention_forward(module: Any) -> Any:
    capped = getattr(module, "attn_logit_softcapping", None) is not None
    return _attention if not capped and _can_be_grouped(module, ATTENTION, biased=True) else None


def _feed_forward_forward(module: Any) -> Any:
    if not all(hasattr(module, name) for name in FEED_FORWARD):  # Phi-3 has gate and up in one projection
        return None
    activated = isinstance(module.act_fn, nn.SiLU | SiLUActivation)
    if activated and _can_be_grouped(module, FEED_FORWARD):
        return _gated_feed_forward
    return _feed_forward if _can_be_grouped(module, FEED_FORWARD[:2]) else None


def _can_be_grouped(module: Any, names: Sequence[str], *, biased: bool = False) -> bool:
    """`biased`: whether the group's forward adds biases, which all of its projections or none must have."""
    projections: list[Any] = [getattr(module, name, None) for name in names]
    if not all(isinstance(p, QLoraLinear4bit) for p in projections):
        return False
    if any(getattr(p.lora_dropout[ADAPTER], "p", 0.0) for p in projections):
        return False
    biases = [p.base_layer.bias is not None for p in projections]
    if any(biases) and not (biased and all(biases)):
        return False
    return len({(type(p), p.scaling[ADAPTER], p.lora_A[ADAPTER].weight.shape[0]) for p in projections}) == 1


@cache  # one class for all layers: torch.compile guards on it
def _subclass(module_type: type, forward: Any) -> type:
    return type(f"Grouped{module_type.__name__}", (module_type,), {"forward": forward})


def _weights(projections: list[Any]) -> tuple[list[Nf4], list[Tensor], list[Tensor]]:
    """Bases, A and B of the projections; behind these A0 and -B0 where there are starts."""
    a0, b0 = zip(*starts, strict=True) if all(starts := [start_factors(p) for p in projections]) else ((), ())
    return (
        [nf4_of(p.base_layer) for p in projections],
        [*(p.lora_A[ADAPTER].weight for p in projections), *a0],
        [*(p.lora_B[ADAPTER].weight for p in projections), *b0],
    )


def _magnitudes(projections: list[Any]) -> list[Tensor]:
    return [p.lora_magnitude_vector[ADAPTER].weight for p in projections]


def _joined(x: Tensor, projections: list[Any]) -> Tensor:
    """x [..., D] -> [..., sum of O]."""
    weights, scaling = _weights(projections), projections[0].scaling[ADAPTER]
    if isinstance(projections[0], QDoraLinear4bit):
        y = dora_linears(x, *weights, _magnitudes(projections), scaling=scaling)
    else:
        y = joined_linears(x, *weights, scaling=scaling)
    biases = [p.base_layer.bias for p in projections]
    return y if biases[0] is None else y + torch.cat(biases)


def _attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """hidden_states [B, S, D] -> [B, S, D]."""
    query, key, value = (y.transpose(1, 2) for y in _query_key_value(self, hidden_states, position_embeddings))
    if past_key_values is not None:  # never in training; a user's own generation may pass one
        key, value = past_key_values.update(key, value, self.layer_idx)
    name = self.config._attn_implementation
    attend = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    out, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
    return self.o_proj(out.reshape(hidden_states.shape[:-1] + (-1,))), None


def _query_key_value(module: Any, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """x [B, S, D] -> [B, S, heads, E] each, query and key rotated unless the layer has no positions (SmolLM3)."""
    projections = [module.q_proj, module.k_proj, module.v_proj]
    y = _joined(x, projections)
    outs = [projection.out_features for projection in projections]
    rotated = getattr(module, "use_rope", True)
    if rotated and not hasattr(module, "q_norm"):
        return rotary(y, *position_embeddings, heads=(outs[0] // module.head_dim, outs[1] // module.head_dim))
    query, key, value = y.split(outs, -1)
    query, key = (_normed(part, name, module) for part, name in ((query, "q_norm"), (key, "k_norm")))
    value = value.unflatten(-1, (-1, module.head_dim))
    if rotated:
        query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if query.dtype != value.dtype:  # the table of OLMo 2 is fp32 whatever the model's dtype
            query, key = query.to(value.dtype), key.to(value.dtype)
    else:
        query, key = query.contiguous(), key.contiguous()  # as the others are: the attention core is compiled once
    return query, key, value.contiguous()  # a view would keep y for the backward pass


def _normed(part: Tensor, name: str, module: Any) -> Tensor:
    """part [B, S, heads * E] -> [B, S, heads, E], by the module's norm of this name, if it has one: of each head, or of
    the whole width as in OLMo 2."""
    heads: Tensor = part.unflatten(-1, (-1, module.head_dim))
    norm = getattr(module, name, None)
    if norm is None:
        return heads
    if norm.weight.shape[0] == module.head_dim:
        heads = norm(heads)
        return heads
    whole: Tensor = norm(part)
    return whole.unflatten(-1, (-1, module.head_dim))


def _feed_forward(self: Any, x: Tensor) -> Tensor:
    """x [B, S, D] -> [B, S, D]."""
    gate, up = _joined(x, [self.gate_proj, self.up_proj]).chunk(2, -1)
    out: Tensor = self.down_proj(self.act_fn(gate) * up)
    return out


def _gated_feed_forward(self: Any, x: Tensor) -> Tensor:
    """x [B, S, D] -> [B, S, D]."""
    projections: list[Any] = [self.gate_proj, self.up_proj, self.down_proj]
    weights, scaling = _weights(projections), self.down_proj.scaling[ADAPTER]
    if isinstance(self.down_proj, QDoraLinear4bit):
        return dora_gated_feed_forward(x, *weights, _magnitudes(projections), scaling=scaling)
    return gated_feed_forward(x, *weights, scaling=scaling)
