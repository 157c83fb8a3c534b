"""The gated feed-forward module under DoRA: ops/feed_forward.py with rows that are scaled (ops/dora_linears.py).

Letters: N tokens, D model width, F feed-forward width; zg and zu, the products before the scales sg and su [F], lie
side by side in `pair` [N, 2F]; σ is the logistic function.

    g = sg * zg,  u = su * zu,  h = g σ(g) * u,   y = sd * (h Wd^T)
    dzg = sg * dh * u * σ(g) (1 + g (1 - σ(g))),  dzu = su * dh * g σ(g),  dm = sum over N of dz * z / m

One pass over `pair` computes dz, h again, and the sums for the magnitudes of gate and up, so neither h nor a pass over
dz and z for them is needed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from launcher.ops.dora_linears import sum_of_products
from launcher.ops.nf4 import Nf4
from launcher.ops.projection_group import HAS_TRITON
from launcher.ops.qlora_linear import adapter_gradients, fields_of, joined_weight


def dora_gated_feed_forward(
    x: Tensor,
    bases: Sequence[Nf4],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    magnitudes: Sequence[Tensor],
    *,
    scaling: float,
) -> Tensor:
    """x [..., D]; bases, A, B and m of gate, up and down -> y [..., D]."""
    m, outs = torch.cat(list(magnitudes[:2])), [q.shape[0] for q in b[:2]]
    pair, lengths = torch.ops.qlora.dora_linears(
        x, fields_of(bases[:2]), list(a[:2]), list(b[:2]), scaling, outs, m.detach()
    )
    scale = (m / lengths).detach()
    gate, up = (pair * scale).to(x.dtype).chunk(2, -1)
    h = (F.silu(gate) * up).detach()  # the operator gives the gradient of pair, and that of m
    z, length = torch.ops.qlora.dora_gated_down(
        h, pair, scale, m, fields_of(bases[2:]), a[2], b[2], scaling, magnitudes[2]
    )
    y: Tensor = (z * (magnitudes[2] / length).detach()).to(x.dtype)
    return y


@torch.library.custom_op("qlora::dora_gated_down", mutates_args=())
def _dora_gated_down(
    h: Tensor,
    pair: Tensor,
    scale: Tensor,
    m: Tensor,
    base: list[Tensor],
    a: Tensor,
    b: Tensor,
    scaling: float,
    m_down: Tensor,
) -> tuple[Tensor, Tensor]:
    """z of the down projection [..., D], and the length of each row of its W, fp32 [D]."""
    weight = joined_weight(h, base, [a], [b], scaling=scaling, shape=([b.shape[0]], h.shape[-1]))
    return F.linear(h, weight), torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


@_dora_gated_down.register_fake
def _(h: Tensor, pair: Tensor, scale: Tensor, m: Tensor, base: list[Tensor], a: Tensor, b: Tensor, *_: Any) -> Any:
    return h.new_empty((*h.shape[:-1], b.shape[0])), h.new_empty(b.shape[0], dtype=torch.float32)


@torch.library.custom_op("qlora::dora_swiglu_gradient_", mutates_args=("dh",))
def dora_swiglu_gradient_(pair: Tensor, dh: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """pair [..., 2F], dh [..., F], scale [2F] -> dz, the gradient of pair, in its dtype, and the sum of dz * pair over
    all but the last dimension, fp32 [2F]; computed in fp32. Overwrites dh by h. Adds in the same order each time."""
    if not (pair.is_cuda and HAS_TRITON):
        gradient, sums, h = plain_dora_swiglu_gradient(pair, dh, scale)
        dh.copy_(h)
        return gradient, sums
    assert dh.is_contiguous()  # it is the result of a product
    pair, width = pair.contiguous(), dh.shape[-1]
    rows, gradient = dh.numel() // width, torch.empty_like(pair)
    partial = torch.empty(triton.cdiv(rows, SPAN), 2 * width, device=pair.device)
    _dora_swiglu_gradient[(triton.cdiv(width, 128), partial.shape[0])](
        gradient, partial, pair, dh, scale, rows, width, SPAN=SPAN, BN=8, BM=128
    )
    return gradient, partial.sum(0)


@dora_swiglu_gradient_.register_fake
def _(pair: Tensor, dh: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return pair.new_empty(pair.shape), torch.empty_like(scale)


def plain_dora_swiglu_gradient(pair: Tensor, dh: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The plain form: dz, the sums, and h."""
    gate, up = (pair.float() * scale).chunk(2, -1)
    sigma = torch.sigmoid(gate)
    gradient = torch.cat([dh * up * sigma * (1 + gate * (1 - sigma)), dh * gate * sigma], -1) * scale
    sums = (gradient * pair.float()).flatten(0, -2).sum(0)
    return gradient.to(pair.dtype), sums, (gate * sigma * up).to(dh.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, pair, scale, m, base, a, b, ctx.scaling, m_down = inputs
    ctx.save_for_backward(pair, scale, m, a, b, m_down, output[0], *base)


def _backward(ctx: Any, dz: Tensor, _: Any) -> tuple[Any, ...]:
    pair, scale, m, a, b, m_down, z, *base = ctx.saved_tensors
    dh = torch.ops.qlora.linears_dx(dz, base, [a], [b], ctx.scaling, [b.shape[0]], a.shape[1])
    dpair, sums = dora_swiglu_gradient_(pair, dh, scale)  # from here on dh holds h
    da, db = adapter_gradients(dz, dh, [a], [b], ctx.scaling)
    return None, dpair, None, sums / m, [None] * len(base), da, db, None, sum_of_products(dz, z) / m_down


_dora_gated_down.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.qlora.dora_gated_down)
def _flops(h_shape: torch.Size, *rest: Any, out_shape: Any, **kwargs: Any) -> int:
    return 2 * h_shape[-1] * int(out_shape[0].numel())


SPAN = 64  # rows whose products one program sums

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _dora_swiglu_gradient(  # type: ignore[no-untyped-def]
        gradient, sums, pair, dh, scale, N, F,  # noqa: N803
        SPAN: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    ):  # fmt: skip
        """Computes SPAN rows and BM columns of gate's half and of up's, and a row of sums [N / SPAN, 2F] of each."""
        column = tl.program_id(0) * BM + tl.arange(0, BM)
        in_row = column < F
        s_gate = tl.load(scale + column, mask=in_row, other=0.0)[None, :]
        s_up = tl.load(scale + F + column, mask=in_row, other=0.0)[None, :]
        of_gate, of_up = tl.zeros((BN, BM), tl.float32), tl.zeros((BN, BM), tl.float32)
        for first in range(0, SPAN, BN):
            row = tl.program_id(1) * SPAN + first + tl.arange(0, BN)
            inside = (row < N)[:, None] & in_row[None, :]
            of_pair = 2 * row[:, None].to(tl.int64) * F + column[None, :]
            of_h = row[:, None].to(tl.int64) * F + column[None, :]
            z_gate = tl.load(pair + of_pair, mask=inside, other=0.0).to(tl.float32)
            z_up = tl.load(pair + of_pair + F, mask=inside, other=0.0).to(tl.float32)
            d = tl.load(dh + of_h, mask=inside, other=0.0).to(tl.float32)
            g, u = z_gate * s_gate, z_up * s_up
            sigma = 1 / (1 + tl.exp(-g))
            d_gate = d * u * sigma * (1 + g * (1 - sigma)) * s_gate
            d_up = d * g * sigma * s_up
            tl.store(gradient + of_pair, d_gate, mask=inside)
            tl.store(gradient + of_pair + F, d_up, mask=inside)
            tl.store(dh + of_h, g * sigma * u, mask=inside)
            of_gate += d_gate * z_gate
            of_up += d_up * z_up
        place = sums + tl.program_id(1) * 2 * F + column
        tl.store(place, tl.sum(of_gate, 0), mask=in_row)
        tl.store(place + F, tl.sum(of_up, 0), mask=in_row)
