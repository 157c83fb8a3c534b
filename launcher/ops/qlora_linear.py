"""The product of a frozen NF4 linear and its LoRA update, with a backward written by hand.

Letters: N tokens, D in-features, O out-features, r rank.

    y = x W^T,   W = dequantised base + s B A                    A [r, D], B [O, r]      (LoRA, arXiv:2106.09685, eq. 3)
    dx = dy W,   dA = s (dy B)^T x,   dB = s dy^T (x A^T)

A and B are fp32 masters and get fp32 gradients; products run in x's dtype. No autocast is involved.

Three opaque operators. Opaque, because a partitioner that sees the dequantisation keeps its result for the backward
pass: seven full weights a layer. Forward saves x alone, which the layer can recompute, and W is made once a pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from launcher.ops.adapter_gradients import gradients
from launcher.ops.nf4 import Nf4, merged_weight


def qlora_linear(x: Tensor, base: Nf4, a: Tensor, b: Tensor, *, scaling: float, dropout: float) -> Tensor:
    """x [..., D] -> [..., O] in x's dtype. Dropout acts where gradients are recorded, so that evaluation is exact."""
    if dropout > 0 and torch.is_grad_enabled():  # the update sees other inputs than the base: two products
        dropped = F.dropout(x, dropout, training=True)
        return frozen_linear(x, base, out_features=b.shape[0]) + lora_update(dropped, a, b, scaling=scaling)
    y: Tensor = torch.ops.qlora.linear(x, *base, a, b, scaling, b.shape[0])
    return y


def frozen_linear(x: Tensor, base: Nf4, *, out_features: int) -> Tensor:
    """x [..., D] times the base alone -> [..., O]."""
    y: Tensor = torch.ops.qlora.linear(x, *base, None, None, 0.0, out_features)
    return y


def lora_update(x: Tensor, a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """scaling * (x A^T) B^T in x's dtype, x [..., D] -> [..., O]."""
    return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scaling


def qlora_linear_reference(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """The plain form on a dequantised weight [O, D], everything in fp32: one merged matrix."""
    merged = weight.float() + scaling * (b.float() @ a.float())
    return F.linear(x.float(), merged)


@torch.library.custom_op("qlora::linear", mutates_args=())
def _linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
    out_features: int,
) -> Tensor:
    shape = (out_features, x.shape[-1])
    base = Nf4(packed, absmax, code, absmax2, code2, offset)
    weight = merged_weight(base, a, b, scaling=scaling, shape=shape, dtype=x.dtype)
    return F.linear(x, weight)


@_linear.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[-1]))


@torch.library.custom_op("qlora::linear_dx", mutates_args=())
def _linear_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
    in_features: int,
) -> Tensor:
    shape = (dy.shape[-1], in_features)
    base = Nf4(packed, absmax, code, absmax2, code2, offset)
    weight = merged_weight(base, a, b, scaling=scaling, shape=shape, dtype=dy.dtype)
    return (dy.reshape(-1, shape[0]) @ weight).view(*dy.shape[:-1], in_features)


@_linear_dx.register_fake
def _(dy: Tensor, *rest: Any) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], rest[-1]))


@torch.library.custom_op("qlora::adapter_gradients", mutates_args=())
def adapter_gradients(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """dy [..., O], x [..., D], a [r, D], b [O, r] -> dA [r, D], dB [O, r], fp32."""
    dy, x = (t.reshape(-1, t.shape[-1]).contiguous() for t in (dy, x))
    return gradients(dy, x, a, b, scaling)


@adapter_gradients.register_fake
def _(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(b)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *base, a, b, ctx.scaling, _ = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(*base, a, b, x if a is not None else None)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    *base, a, b, x = ctx.saved_tensors
    dx = torch.ops.qlora.linear_dx(dy, *base, a, b, ctx.scaling, ctx.in_features) if ctx.needs_input_grad[0] else None
    da, db = (None, None) if a is None else adapter_gradients(dy, x, a, b, ctx.scaling)
    return dx, None, None, None, None, None, None, da, db, None, None


_linear.register_autograd(_backward, setup_context=_save)


@register_flop_formula([torch.ops.qlora.linear, torch.ops.qlora.linear_dx])
def _flops(x_shape: torch.Size, *rest: Any, out_shape: torch.Size, **kwargs: Any) -> int:
    """Of the large product: what the activation budget weighs against memory (memory/recompute.py)."""
    return 2 * out_shape.numel() * x_shape[-1]
