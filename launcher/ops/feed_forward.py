"""The gated feed-forward module: gate and up as one product, and a down projection that recomputes its input.

Letters: N tokens, D model width, F feed-forward width; g = x Wg^T and u = x Wu^T lie side by side in `pair` [N, 2F]; σ
is the logistic function (SwiGLU: arXiv:2002.05202).

    h = g σ(g) * u,   out = h Wd^T
    dh = dout Wd,   du = dh * g σ(g),   dg = dh * u * σ(g) (1 + g (1 - σ(g)))

The adapter of the down projection needs h in the backward pass. The pass over `pair` that computes dg and du recomputes
h as well, so it is never kept: F numbers per token and layer. dg and du are written side by side, as the next product
reads them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from launcher.ops.nf4 import Nf4
from launcher.ops.projection_group import HAS_TRITON
from launcher.ops.qlora_linear import adapter_gradients, fields_of, joined_linears, joined_weight


def gated_feed_forward(
    x: Tensor, bases: Sequence[Nf4], a: Sequence[Tensor], b: Sequence[Tensor], *, scaling: float
) -> Tensor:
    """x [..., D]; bases, A [r, D or F] and B [F or D, r] of gate, up and down -> out [..., D]. After the three A and
    the three B may come their A0 and -B0 (ops/qlora_linear.py)."""
    pair = joined_linears(x, bases[:2], [*a[:2], *a[3:5]], [*b[:2], *b[3:5]], scaling=scaling)
    gate, up = pair.chunk(2, -1)
    h = (F.silu(gate) * up).detach()  # the operator gives the gradient of pair
    out: Tensor = torch.ops.qlora.gated_down(h, pair, fields_of(bases[2:]), list(a[2::3]), list(b[2::3]), scaling)
    return out


def gated_feed_forward_reference(
    x: Tensor, weights: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], *, scaling: float
) -> Tensor:
    """The plain form on dequantised weights [O, D], everything in fp32."""
    gate, up, down = (w.float() + scaling * (bi.float() @ ai.float()) for w, ai, bi in zip(weights, a, b, strict=True))
    return (F.silu(x.float() @ gate.T) * (x.float() @ up.T)) @ down.T


@torch.library.custom_op("qlora::gated_down", mutates_args=())
def _gated_down(
    h: Tensor, pair: Tensor, base: list[Tensor], a: list[Tensor], b: list[Tensor], scaling: float
) -> Tensor:
    return F.linear(h, joined_weight(h, base, a, b, scaling=scaling, shape=([b[0].shape[0]], h.shape[-1])))


@_gated_down.register_fake
def _(h: Tensor, pair: Tensor, base: list[Tensor], a: list[Tensor], b: list[Tensor], scaling: float) -> Tensor:
    return h.new_empty((*h.shape[:-1], b[0].shape[0]))


@torch.library.custom_op("qlora::swiglu_gradient_", mutates_args=("dh",))
def swiglu_gradient_(pair: Tensor, dh: Tensor) -> Tensor:
    """pair [..., 2F], dh [..., F] -> the gradient of pair, in its dtype, computed in fp32. Overwrites dh by h."""
    if not (pair.is_cuda and HAS_TRITON):
        gradient, h = plain_swiglu_gradient(pair, dh)
        dh.copy_(h)
        return gradient
    assert dh.is_contiguous()  # it is the result of a product
    pair = pair.contiguous()
    gradient, width = torch.empty_like(pair), dh.shape[-1]
    blocks = triton.cdiv(width, WIDE)
    _swiglu_gradient[(dh.numel() // width * blocks,)](gradient, pair, dh, width, blocks, WIDE=WIDE)
    return gradient


@swiglu_gradient_.register_fake
def _(pair: Tensor, dh: Tensor) -> Tensor:
    return pair.new_empty(pair.shape)


def plain_swiglu_gradient(pair: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """The plain form: the gradient of pair, and h."""
    gate, up = pair.float().chunk(2, -1)
    sigma = torch.sigmoid(gate)
    gradient = torch.cat([dh * up * sigma * (1 + gate * (1 - sigma)), dh * gate * sigma], -1)
    return gradient.to(pair.dtype), (gate * sigma * up).to(dh.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, pair, base, a, b, ctx.scaling = inputs
    ctx.count = len(a)
    ctx.save_for_backward(pair, *a, *b, *base)


def _backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    pair, *rest = ctx.saved_tensors
    a, b, base = rest[: ctx.count], rest[ctx.count : 2 * ctx.count], rest[2 * ctx.count :]
    dh = torch.ops.qlora.linears_dx(dout, base, a, b, ctx.scaling, [b[0].shape[0]], a[0].shape[1])
    dpair = swiglu_gradient_(pair, dh)  # from here on dh holds h
    da, db = adapter_gradients(dout, dh, a[:1], b[:1], ctx.scaling)
    frozen = [None] * (ctx.count - 1)
    return None, dpair, [None] * len(base), [da, *frozen], [db, *frozen], None


_gated_down.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.qlora.gated_down)
def _flops(h_shape: torch.Size, *rest: Any, out_shape: torch.Size, **kwargs: Any) -> int:
    return 2 * h_shape[-1] * out_shape.numel()


WIDE = 1024  # columns per program: each thread reads 16 bytes of each matrix

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _swiglu_gradient(gradient, pair, dh, F, blocks, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """Computes WIDE columns of one row of both results."""
        row = (tl.program_id(0) // blocks).to(tl.int64)
        column = (tl.program_id(0) % blocks) * WIDE + tl.arange(0, WIDE)
        inside, of_pair, of_h = column < F, 2 * row * F + column, dh + row * F + column
        g = tl.load(pair + of_pair, mask=inside).to(tl.float32)
        u = tl.load(pair + of_pair + F, mask=inside).to(tl.float32)
        d = tl.load(of_h, mask=inside).to(tl.float32)
        sigma = 1 / (1 + tl.exp(-g))
        tl.store(gradient + of_pair, d * u * sigma * (1 + g * (1 - sigma)), mask=inside)
        tl.store(gradient + of_pair + F, d * g * sigma, mask=inside)
        tl.store(of_h, g * sigma * u, mask=inside)
