"""Products of one input with frozen NF4 linears and their LoRA updates, with a hand-written backward pass.

Letters: N tokens, D in-features, O out-features, r rank. Projections of one input (query, key and value; gate and up)
share one operator: one product, and adapter gradients that read x once.

    y = x W^T,   W = dequantised base + s B A                    A [r, D], B [O, r]      (LoRA, arXiv:2106.09685, eq. 3)
    dx = dy W,   dA = s (dy B)^T x,   dB = s dy^T (x A^T)        dx summed over the projections

A and B are fp32 masters with fp32 gradients, which dropout computes in x's dtype; products run in x's dtype, without
autocast.

An adapter that starts from the base's own weight (model/lora_start.py) has its start taken out again: W = base +
s (B A - B0 A0). Its A is followed by A0 in the lists, its B by -B0, neither of which has a gradient. The same matrix is
s [B - B0, B0] [A; A - A0], which is what is computed: at the start it is zero bit by bit in every dtype, and later as
exact as a plain update, where B A - B0 A0 would lose the digits that cancel.

The three operators are opaque to the compiler: a partitioner that sees the dequantisation keeps its result for the
backward pass, seven full weights per layer. The forward pass saves only x, which the layer can recompute, and each W is
computed once per pass.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from launcher.ops.adapter_gradients import gradients
from launcher.ops.nf4 import Nf4, merged_weights


def joined_linears(
    x: Tensor, bases: Sequence[Nf4], a: Sequence[Tensor], b: Sequence[Tensor], *, scaling: float
) -> Tensor:
    """x [..., D] and the base, A and B of each projection -> y side by side [..., sum of O], in x's dtype. After the A
    and the B of all projections may come their A0 and their -B0."""
    outs = [q.shape[0] for q in b[: len(bases)]]
    y: Tensor = torch.ops.qlora.linears(x, fields_of(bases), list(a), list(b), scaling, outs)
    return y


def qlora_linear(
    x: Tensor, base: Nf4, a: Tensor, b: Tensor, *, scaling: float, dropout: float, start: Sequence[Tensor] = ()
) -> Tensor:
    """x [..., D] -> [..., O] in x's dtype. Dropout acts only where gradients are recorded, so evaluation is exact.
    `start`: A0 and -B0, which see the same dropped x."""
    if dropout > 0 and torch.is_grad_enabled():  # base and update have different inputs: two products
        dropped = F.dropout(x, dropout, training=True)
        return frozen_linear(x, base, out_features=b.shape[0]) + lora_update(
            dropped, a, b, scaling=scaling, start=start
        )
    return joined_linears(x, [base], [a, *start[:1]], [b, *start[1:]], scaling=scaling)


def frozen_linear(x: Tensor, base: Nf4, *, out_features: int) -> Tensor:
    """x [..., D] times the base alone -> [..., O]."""
    y: Tensor = torch.ops.qlora.linears(x, fields_of([base]), [], [], 0.0, [out_features])
    return y


def lora_update(x: Tensor, a: Tensor, b: Tensor, *, scaling: float, start: Sequence[Tensor] = ()) -> Tensor:
    """scaling * (x A^T) B^T in x's dtype, x [..., D] -> [..., O]; `start`: as in `qlora_linear`."""
    [p], [q] = update_factors([a, *start[:1]], [b, *start[1:]], 1)
    return F.linear(F.linear(x, p.to(x.dtype)), q.to(x.dtype)) * scaling


def update_factors(a: Sequence[Tensor], b: Sequence[Tensor], count: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Two factors of each of `count` updates: A [r, D] and B [O, r] themselves; where A0 and -B0 follow them,
    [A; A - A0] and [B - B0, B0], fp32."""
    if len(a) <= count:
        return a, b
    return (
        [torch.cat([p, p - start]) for p, start in zip(a[:count], a[count:], strict=True)],
        [torch.cat([q + start, -start], 1) for q, start in zip(b[:count], b[count:], strict=True)],
    )


def qlora_linear_reference(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """The plain form, with a dequantised weight [O, D]: one merged matrix in fp32."""
    merged = weight.float() + scaling * (b.float() @ a.float())
    return F.linear(x.float(), merged)


def fields_of(bases: Sequence[Nf4]) -> list[Tensor]:
    """The tensors of one base after another, as an operator takes them; fields that are None are left out."""
    return [field for base in bases for field in base if field is not None]


def joined_weight(
    like: Tensor,
    fields: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *,
    scaling: float,
    shape: tuple[Sequence[int], int],
) -> Tensor:
    """The stacked W of the projections [sum of O, D], in dtype and on the device of `like`; shape: (every O, D)."""
    outs, in_features = shape
    a, b = update_factors(a, b, len(outs))
    size = len(fields) // len(outs)
    assert size in (3, 6), "the bases of one product all have quantised scales, or none has"
    bases = [Nf4(*fields[start : start + size]) for start in range(0, len(fields), size)]
    return merged_weights(bases, a, b, scaling=scaling, outs=outs, out=like.new_empty(sum(outs), in_features))


@torch.library.custom_op("qlora::linears", mutates_args=())
def _linears(
    x: Tensor, bases: list[Tensor], a: list[Tensor], b: list[Tensor], scaling: float, outs: list[int]
) -> Tensor:
    return F.linear(x, joined_weight(x, bases, a, b, scaling=scaling, shape=(outs, x.shape[-1])))


@_linears.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(rest[-1])))


@torch.library.custom_op("qlora::linears_dx", mutates_args=())
def _linears_dx(
    dy: Tensor,
    bases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scaling: float,
    outs: list[int],
    in_features: int,
) -> Tensor:
    return dy @ joined_weight(dy, bases, a, b, scaling=scaling, shape=(outs, in_features))


@_linears_dx.register_fake
def _(dy: Tensor, *rest: Any) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], rest[-1]))


@torch.library.custom_op("qlora::adapter_gradients", mutates_args=())
def adapter_gradients(dy: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scaling: float) -> tuple[Tensor, Tensor]:
    """dy [..., sum of O], x [..., D], a: [r, D] and b: [O, r] of each projection -> stacked dA and dB, fp32."""
    return gradients(flat(dy), flat(x), a, b, scaling)


@adapter_gradients.register_fake
def _(dy: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scaling: float) -> tuple[Tensor, Tensor]:
    rank, features = a[0].shape
    return a[0].new_empty(len(a) * rank, features), b[0].new_empty(sum(each.shape[0] for each in b), rank)


def flat(t: Tensor) -> Tensor:
    """[..., M] -> [N, M], contiguous."""
    return t.reshape(-1, t.shape[-1]).contiguous()


def save_for_linears(ctx: Any, inputs: Sequence[Any], *more: Tensor) -> None:
    """Keeps what the backward pass of an operator with these first inputs needs, and `more` tensors beside it."""
    x, bases, a, b, ctx.scaling, ctx.outs = inputs
    ctx.in_features, ctx.lengths = x.shape[-1], (len(bases), len(a), len(b))
    ctx.save_for_backward(*more, *bases, *a, *b, *([x] if b else []))


def backward_of_linears(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """The gradients of those inputs, and the tensors that were kept beside them."""
    tensors = ctx.saved_tensors
    saved = iter(tensors)
    more = list(islice(saved, len(tensors) - sum(ctx.lengths) - bool(ctx.lengths[2])))
    bases, a, b = (list(islice(saved, length)) for length in ctx.lengths)
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.qlora.linears_dx(dy, bases, a, b, ctx.scaling, ctx.outs, ctx.in_features)
    da_list: list[Tensor | None] = []
    db_list: list[Tensor | None] = []
    if a:
        count = len(ctx.outs)  # behind them are starts
        da, db = adapter_gradients(dy, next(saved), a[:count], b[:count], ctx.scaling)
        frozen = [None] * (len(a) - count)
        da_list = [*da.split(a[0].shape[0]), *frozen]
        db_list = [*db.split(list(ctx.outs)), *frozen]
    return (dx, [None] * len(bases), da_list, db_list, None, None), *more


_linears.register_autograd(
    lambda ctx, dy: backward_of_linears(ctx, dy)[0],
    setup_context=lambda ctx, inputs, output: save_for_linears(ctx, inputs),
)


@register_flop_formula(torch.ops.qlora.linears)
def _flops(x_shape: torch.Size, *rest: Any, out_shape: torch.Size, **kwargs: Any) -> int:
    """Flops of the large product, which the activation budget weighs against memory (memory/policy.py)."""
    return 2 * x_shape[-1] * out_shape.numel()


@register_flop_formula(torch.ops.qlora.linears_dx)
def _flops_dx(dy_shape: torch.Size, *rest: Any, out_shape: torch.Size, **kwargs: Any) -> int:
    return 2 * out_shape[-1] * dy_shape.numel()
