"""DoRA: the products of ops/qlora_linear.py, each row of W scaled to a length that is trained.

Letters: N tokens, D in-features, O out-features, r rank; s [O] is the scale of the rows.

    z = x W^T,   W = dequantised base + scaling B A              A [r, D], B [O, r]
    y = s * z,   s = m / |W|, |W| the length of each row         m [O]             (DoRA, arXiv:2402.09353, eq. 5)
    dz = dy * s,   dm = sum over N of dy * z / |W| = sum over N of dz * z / m

|W| counts as a constant in the backward pass, as in section 4.3 there. The operator computes z, |W|, and from dz every
gradient. What lies between z and y is left to the compiler, which does both multiplications by s while it computes what
stands beside them. z is kept for dm; that costs one pass over dz and z, not one product.

Where a row's m is 0, dm is not a number, as y is where |W| is 0: the step is refused.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from launcher.ops.nf4 import Nf4
from launcher.ops.projection_group import HAS_TRITON
from launcher.ops.qlora_linear import backward_of_linears, fields_of, flat, joined_weight, save_for_linears


def dora_linears(
    x: Tensor,
    bases: Sequence[Nf4],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    magnitudes: Sequence[Tensor],
    *,
    scaling: float,
) -> Tensor:
    """x [..., D]; base, A, B and m [O] of each projection -> y side by side [..., sum of O], in x's dtype."""
    outs, m = [q.shape[0] for q in b], torch.cat(list(magnitudes))
    z, lengths = torch.ops.qlora.dora_linears(x, fields_of(bases), list(a), list(b), scaling, outs, m)
    y: Tensor = (z * (m / lengths).detach()).to(x.dtype)
    return y


@torch.library.custom_op("qlora::dora_linears", mutates_args=())
def _dora_linears(
    x: Tensor, bases: list[Tensor], a: list[Tensor], b: list[Tensor], scaling: float, outs: list[int], m: Tensor
) -> tuple[Tensor, Tensor]:
    """z [..., sum of O], and the length of each row of W, fp32 [sum of O]."""
    weight = joined_weight(x, bases, a, b, scaling=scaling, shape=(outs, x.shape[-1]))
    return F.linear(x, weight), torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


@_dora_linears.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    width = rest[-1].shape[0]
    return x.new_empty((*x.shape[:-1], width)), x.new_empty(width, dtype=torch.float32)


@torch.library.custom_op("qlora::sum_of_products", mutates_args=())
def sum_of_products(p: Tensor, q: Tensor) -> Tensor:
    """p, q [..., O] -> the sum of p * q over all but the last dimension, fp32 [O]. Adds in the same order each time."""
    p, q = flat(p), flat(q)
    if not (p.is_cuda and HAS_TRITON):
        return (p.float() * q.float()).sum(0)
    (rows, columns), span = p.shape, 256
    partial = torch.empty(triton.cdiv(rows, span), columns, device=p.device)
    _sum_of_products[(triton.cdiv(columns, 128), partial.shape[0])](
        partial, p, q, rows, columns, SPAN=span, BN=16, BM=128
    )
    return partial.sum(0)


@sum_of_products.register_fake
def _(p: Tensor, q: Tensor) -> Tensor:
    return p.new_empty(p.shape[-1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *of_linears, m = inputs
    save_for_linears(ctx, of_linears, m, output[0])


def _backward(ctx: Any, dz: Tensor, _: Any) -> tuple[Any, ...]:
    gradients, m, z = backward_of_linears(ctx, dz)
    return *gradients, sum_of_products(dz, z) / m if ctx.needs_input_grad[-1] else None


_dora_linears.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.qlora.dora_linears)
def _flops(x_shape: torch.Size, *rest: Any, out_shape: Any, **kwargs: Any) -> int:
    """Of the large product, as qlora::linears."""
    return 2 * x_shape[-1] * int(out_shape[0].numel())


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _sum_of_products(  # type: ignore[no-untyped-def]
        out, p, q, N, M, SPAN: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr
    ):
        """Computes, for SPAN rows and BM columns of p and q [N, M], a row of out [N / SPAN, M]."""
        column = tl.program_id(0) * BM + tl.arange(0, BM)
        total = tl.zeros((BN, BM), tl.float32)
        for first in range(0, SPAN, BN):
            row = tl.program_id(1) * SPAN + first + tl.arange(0, BN)
            place = row[:, None].to(tl.int64) * M + column[None, :]
            inside = (row < N)[:, None] & (column < M)[None, :]
            p_tile = tl.load(p + place, mask=inside, other=0.0).to(tl.float32)
            total += p_tile * tl.load(q + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + tl.program_id(1) * M + column, tl.sum(total, 0), mask=column < M)
