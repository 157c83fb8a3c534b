"""Attention and feed-forward blocks that send the projections of one input through one operator (ops/qlora_linear.py),
or all of a feed-forward block (ops/feed_forward.py).

The blocks are transformers' own but for that: same modules, same names, same order of operations. Each becomes an
instance of a subclass with another forward, where all projections of a group are NF4 with an adapter of one rank and
scale, and no dropout or bias; elsewhere it stays as it is.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from launcher.model.lora import ADAPTER, QLoraLinear4bit, nf4_of
from launcher.ops.feed_forward import gated_feed_forward
from launcher.ops.nf4 import Nf4
from launcher.ops.qlora_linear import joined_linears
from launcher.ops.rotary import rotary

ATTENTION = ("q_proj", "k_proj", "v_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def group_projections(layers: nn.ModuleList, *, mlp: str) -> int:
    """Let the attention and the block named `mlp` of each layer group their projections, in place; returns how many of
    these blocks do."""
    grouped = 0
    for layer in layers:
        for name, forward_of in (("self_attn", _attention_forward), (mlp, _feed_forward_forward)):
            block = getattr(layer, name)
            forward = forward_of(block)
            if forward is not None:
                block.__class__ = _subclass(type(block), forward)
                grouped += 1
    return grouped


def _attention_forward(block: Any) -> Any:
    return _attention if _are_alike(block, ATTENTION) else None


def _feed_forward_forward(block: Any) -> Any:
    if isinstance(block.act_fn, nn.SiLU | SiLUActivation) and _are_alike(block, FEED_FORWARD):
        return _gated_feed_forward
    return _feed_forward if _are_alike(block, FEED_FORWARD[:2]) else None


def _are_alike(block: Any, names: Sequence[str]) -> bool:
    projections = [getattr(block, name) for name in names]
    if not all(isinstance(p, QLoraLinear4bit) for p in projections):
        return False
    if any(p.base_layer.bias is not None or getattr(p.lora_dropout[ADAPTER], "p", 0.0) for p in projections):
        return False
    return len({(p.scaling[ADAPTER], p.lora_A[ADAPTER].weight.shape[0]) for p in projections}) == 1


_made: dict[tuple[type, Any], type] = {}  # one class for all layers: torch.compile guards on it


def _subclass(block: type, forward: Any) -> type:
    if (block, forward) not in _made:
        _made[block, forward] = type(f"Grouped{block.__name__}", (block,), {"forward": forward})
    return _made[block, forward]


def _columns(projections: list[Any]) -> tuple[list[Nf4], list[Tensor], list[Tensor]]:
    """Bases, A and B of the projections."""
    return (
        [nf4_of(p.base_layer) for p in projections],
        [p.lora_A[ADAPTER].weight for p in projections],
        [p.lora_B[ADAPTER].weight for p in projections],
    )


def _joined(x: Tensor, projections: list[Any]) -> Tensor:
    """x [..., D] -> [..., sum of O]."""
    return joined_linears(x, *_columns(projections), scaling=projections[0].scaling[ADAPTER])


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
    if past_key_values is not None:  # never in training; a caller's own generation may have one
        key, value = past_key_values.update(key, value, self.layer_idx)
    name = self.config._attn_implementation
    attend = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    out, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
    return self.o_proj(out.reshape(hidden_states.shape[:-1] + (-1,))), None


def _query_key_value(block: Any, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """x [B, S, D] -> [B, S, heads, E] each, query and key rotated."""
    projections = [block.q_proj, block.k_proj, block.v_proj]
    y = _joined(x, projections)
    outs = [projection.out_features for projection in projections]
    if not hasattr(block, "q_norm"):
        return rotary(y, *position_embeddings, heads=(outs[0] // block.head_dim, outs[1] // block.head_dim))
    query, key, value = (part.unflatten(-1, (-1, block.head_dim)) for part in y.split(outs, -1))  # qwen3
    query, key = apply_rotary_pos_emb(
        block.q_norm(query).transpose(1, 2), block.k_norm(key).transpose(1, 2), *position_embeddings
    )
    return query.transpose(1, 2), key.transpose(1, 2), value.contiguous()  # a view would keep y for the backward pass


def _feed_forward(self: Any, x: Tensor) -> Tensor:
    """x [B, S, D] -> [B, S, D]."""
    gate, up = _joined(x, [self.gate_proj, self.up_proj]).chunk(2, -1)
    out: Tensor = self.down_proj(self.act_fn(gate) * up)
    return out


def _gated_feed_forward(self: Any, x: Tensor) -> Tensor:
    """x [B, S, D] -> [B, S, D]."""
    projections = [self.gate_proj, self.up_proj, self.down_proj]
    return gated_feed_forward(x, *_columns(projections), scaling=self.down_proj.scaling[ADAPTER])
