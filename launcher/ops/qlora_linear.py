"""The products of one input with frozen NF4 linears and their LoRA updates, with a backward written by hand.

Letters: N tokens, D in-features, O out-features, r rank; projections of one input (query, key and value; gate and up)
go through one operator together, since their adapter gradients read the same x.

    y = x W^T,   W = dequantised base + s B A                    A [r, D], B [O, r]      (LoRA, arXiv:2106.09685, eq. 3)
    dx = dy W,   dA = s (dy B)^T x,   dB = s dy^T (x A^T)        dx summed over the projections

A and B are fp32 masters and get fp32 gradients, made in x's dtype where there is dropout; products run in x's dtype. No
autocast is involved.

Three opaque operators. Opaque, because a partitioner that sees the dequantisation keeps its result for the backward
pass: seven full weights a layer. Forward saves x alone, which the layer can recompute, and each W is made once a pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from launcher.ops.adapter_gradients import gradients
from launcher.ops.nf4 import Nf4, merged_weight


def qlora_linears(
    x: Tensor, bases: Sequence[Nf4], a: Sequence[Tensor], b: Sequence[Tensor], *, scaling: float
) -> list[Tensor]:
    """x [..., D], for each projection its base, A and B -> [..., O] each, in x's dtype."""
    outs = [each.shape[0] for each in b]
    y: list[Tensor] = torch.ops.qlora.linears(x, *_columns(bases), list(a), list(b), scaling, outs)
    return y


def qlora_linear(x: Tensor, base: Nf4, a: Tensor, b: Tensor, *, scaling: float, dropout: float) -> Tensor:
    """x [..., D] -> [..., O] in x's dtype. Dropout acts where gradients are recorded, so that evaluation is exact."""
    if dropout > 0 and torch.is_grad_enabled():  # the update sees other inputs than the base: two products
        dropped = F.dropout(x, dropout, training=True)
        return frozen_linear(x, base, out_features=b.shape[0]) + lora_update(dropped, a, b, scaling=scaling)
    return qlora_linears(x, [base], [a], [b], scaling=scaling)[0]


def frozen_linear(x: Tensor, base: Nf4, *, out_features: int) -> Tensor:
    """x [..., D] times the base alone -> [..., O]."""
    y: Tensor = torch.ops.qlora.linears(x, *_columns([base]), [], [], 0.0, [out_features])[0]
    return y


def lora_update(x: Tensor, a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """scaling * (x A^T) B^T in x's dtype, x [..., D] -> [..., O]."""
    return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scaling


def qlora_linear_reference(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """The plain form on a dequantised weight [O, D], everything in fp32: one merged matrix."""
    merged = weight.float() + scaling * (b.float() @ a.float())
    return F.linear(x.float(), merged)


def _columns(bases: Sequence[Nf4]) -> list[list[Tensor]]:
    """The bases by field: an operator takes lists of tensors. A field that is None has an empty list."""
    return [[t for t in column if t is not None] for column in zip(*bases, strict=True)]


def _weights(
    columns: Sequence[Sequence[Tensor]],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: float,
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
) -> list[Any]:
    """For each projection a call that makes its W; none is made before it is asked for."""

    def weight(i: int) -> Tensor:
        base = Nf4(*(column[i] if column else None for column in columns))  # type: ignore[arg-type]
        mine = (a[i], b[i]) if a else (None, None)
        return merged_weight(base, *mine, scaling=scaling, shape=shapes[i], dtype=dtype)

    return [lambda i=i: weight(i) for i in range(len(shapes))]


@torch.library.custom_op("qlora::linears", mutates_args=())
def _linears(
    x: Tensor,
    packed: list[Tensor],
    absmax: list[Tensor],
    code: list[Tensor],
    absmax2: list[Tensor],
    code2: list[Tensor],
    offset: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scaling: float,
    outs: list[int],
) -> list[Tensor]:
    columns, shapes = (packed, absmax, code, absmax2, code2, offset), [(o, x.shape[-1]) for o in outs]
    return [F.linear(x, weight()) for weight in _weights(columns, a, b, scaling, shapes, x.dtype)]


@_linears.register_fake
def _(x: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], o)) for o in rest[-1]]


@torch.library.custom_op("qlora::linears_dx", mutates_args=())
def _linears_dx(
    dy: list[Tensor],
    packed: list[Tensor],
    absmax: list[Tensor],
    code: list[Tensor],
    absmax2: list[Tensor],
    code2: list[Tensor],
    offset: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scaling: float,
    in_features: int,
) -> Tensor:
    columns, shapes = (packed, absmax, code, absmax2, code2, offset), [(each.shape[-1], in_features) for each in dy]
    first, *others = zip(dy, _weights(columns, a, b, scaling, shapes, dy[0].dtype), strict=True)
    dx = _flat(first[0]) @ first[1]()
    for each, weight in others:
        dx.addmm_(_flat(each), weight())
    return dx.view(*dy[0].shape[:-1], in_features)


@_linears_dx.register_fake
def _(dy: list[Tensor], *rest: Any) -> Tensor:
    return dy[0].new_empty((*dy[0].shape[:-1], rest[-1]))


@torch.library.custom_op("qlora::adapter_gradients", mutates_args=())
def adapter_gradients(
    dy: list[Tensor], x: Tensor, a: list[Tensor], b: list[Tensor], scaling: float
) -> tuple[Tensor, Tensor]:
    """dy [..., O] each, x [..., D], a [r, D] each, b [O, r] each -> dA and dB, fp32, stacked over the projections."""
    return gradients([_flat(each).contiguous() for each in dy], _flat(x).contiguous(), a, b, scaling)


@adapter_gradients.register_fake
def _(dy: list[Tensor], x: Tensor, a: list[Tensor], b: list[Tensor], scaling: float) -> tuple[Tensor, Tensor]:
    rank, features = a[0].shape
    return a[0].new_empty(len(a) * rank, features), b[0].new_empty(sum(each.shape[0] for each in b), rank)


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, *lists, ctx.scaling, _ = inputs
    ctx.in_features, ctx.lengths = x.shape[-1], [len(each) for each in lists]
    trains = [x] if lists[-1] else []
    ctx.save_for_backward(*(tensor for each in lists for tensor in each), *trains)


def _backward(ctx: Any, dy: list[Tensor]) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    lists = [[saved.pop(0) for _ in range(length)] for length in ctx.lengths]
    *columns, a, b = lists
    nothing: list[Any] = [[None] * len(column) for column in columns]
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.qlora.linears_dx(dy, *columns, a, b, ctx.scaling, ctx.in_features)
    if not a:
        return dx, *nothing, [], [], None, None
    da, db = adapter_gradients(dy, saved[0], a, b, ctx.scaling)
    return (
        dx, *nothing, list(da.split(a[0].shape[0])), list(db.split([each.shape[0] for each in b])), None, None,
    )  # fmt: skip


_linears.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.qlora.linears)
def _flops(x_shape: torch.Size, *rest: Any, out_shape: list[torch.Size], **kwargs: Any) -> int:
    """Of the large products: what the activation budget weighs against memory (memory/recompute.py)."""
    return 2 * x_shape[-1] * sum(shape.numel() for shape in out_shape)


@register_flop_formula(torch.ops.qlora.linears_dx)
def _flops_dx(dy_shapes: list[torch.Size], *rest: Any, out_shape: torch.Size, **kwargs: Any) -> int:
    return 2 * out_shape[-1] * sum(shape.numel() for shape in dy_shapes)
