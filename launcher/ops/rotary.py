"""Rotary position embedding of the joined projections query | key | value, which also separates them.

Letters: B blocks, S positions, E head width, H query heads, K key-value heads; y [B, S, (H + 2K) E]. With x = (x1, x2)
the halves of a head, and cos and sin split the same way (RoFormer, arXiv:2104.09864, in Llama's half-split form):

    out = (x1 cos1 - x2 sin1,  x2 cos2 + x1 sin2)
    dx  = (d1 cos1 + d2 sin2,  d2 cos2 - d1 sin1)

One pass in each direction. The compiler's own backward pass joins three gradients under masks (111 us for 43 us of
memory traffic at 16,384 tokens of Llama 1B, one H200), and its value is a view that keeps all of y.
"""

from typing import Any

import torch
from torch import Tensor

from launcher.ops.projection_group import HAS_TRITON


def rotary(y: Tensor, cos: Tensor, sin: Tensor, *, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, S, (H + 2K) E], cos and sin [B or 1, S, E], heads (H, K) -> query [B, S, H, E], key and value [B, S, K, E].

    transformers' own model forward makes one table for all blocks.
    """
    blocks = y.shape[0]
    query, key, value = torch.ops.qlora.rotary(y, cos.expand(blocks, -1, -1), sin.expand(blocks, -1, -1), *heads)
    return query, key, value


@torch.library.custom_op("qlora::rotary", mutates_args=())
def _rotary(y: Tensor, cos: Tensor, sin: Tensor, heads: int, kv: int) -> tuple[Tensor, Tensor, Tensor]:
    if not (y.is_cuda and HAS_TRITON):
        return plain_rotary(y, cos, sin, heads=(heads, kv))
    y, (batch, length, width) = y.contiguous(), cos.shape
    parts = [y.new_empty(batch, length, n, width) for n in (heads, kv, kv)]
    _turn(y, parts, cos, sin, back=False)
    return parts[0], parts[1], parts[2]


@_rotary.register_fake
def _(y: Tensor, cos: Tensor, sin: Tensor, heads: int, kv: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (y.new_empty(*cos.shape[:2], n, cos.shape[2]) for n in (heads, kv, kv))
    return query, key, value


@torch.library.custom_op("qlora::rotary_gradient", mutates_args=())
def rotary_gradient(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradients of query [B, S, H, E], key and value [B, S, K, E] -> gradient of y [B, S, (H + 2K) E]."""
    if not (dq.is_cuda and HAS_TRITON):
        return plain_rotary_gradient(dq, dk, dv, cos, sin)
    parts = [d.contiguous() for d in (dq, dk, dv)]
    dy = dq.new_empty(*cos.shape[:2], sum(d.shape[2] for d in parts) * cos.shape[2])
    _turn(dy, parts, cos, sin, back=True)
    return dy


@rotary_gradient.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return dq.new_empty(*cos.shape[:2], (dq.shape[2] + dk.shape[2] + dv.shape[2]) * cos.shape[2])


def plain_rotary(y: Tensor, cos: Tensor, sin: Tensor, *, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The plain form, computed in fp32 and rounded once."""
    parts = y.view(*cos.shape[:2], -1, cos.shape[2]).split([heads[0], heads[1], heads[1]], 2)
    cos, sin = cos.float()[:, :, None], sin.float()[:, :, None]
    query, key = ((x * cos + _turned(x.float()) * sin).to(y.dtype) for x in parts[:2])
    return query, key, parts[2].clone()


def plain_rotary_gradient(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The plain form of the gradient."""
    cos, sin = cos.float()[:, :, None], sin.float()[:, :, None]
    query, key = ((d * cos - _turned(d * sin)).to(d.dtype) for d in (dq, dk))
    return torch.cat([query, key, dv], 2).flatten(2)


def _turned(x: Tensor) -> Tensor:
    """(x1, x2) -> (-x2, x1)."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:
    return rotary_gradient(dq, dk, dv, *ctx.saved_tensors), None, None, None, None


_rotary.register_autograd(_backward, setup_context=_save)

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _rotate(  # type: ignore[no-untyped-def]
        y, query, key, value, cos, sin, H, K, E, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    ):  # fmt: skip
        """One token, from y to query, key and value; with BACK from their gradients to that of y."""
        token = tl.program_id(0).to(tl.int64)
        head, k = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
        half = E // 2
        inside = (head < H + 2 * K) & (k < half)
        of_y = y + token * (H + 2 * K) * E + head * E + k
        # Each head lies in one of the three; masks keep the other two pointers from being followed.
        of_q = query + token * H * E + head * E + k
        of_k = key + token * K * E + (head - H) * E + k
        of_v = value + token * K * E + (head - H - K) * E + k
        in_q, in_k, in_v = inside & (head < H), inside & (head >= H) & (head < H + K), inside & (head >= H + K)
        table = token * E + k
        turns = head < H + K
        c1 = tl.where(turns, tl.load(cos + table, mask=k < half).to(tl.float32), 1.0)
        s1 = tl.where(turns, tl.load(sin + table, mask=k < half).to(tl.float32), 0.0)
        c2 = tl.where(turns, tl.load(cos + table + half, mask=k < half).to(tl.float32), 1.0)
        s2 = tl.where(turns, tl.load(sin + table + half, mask=k < half).to(tl.float32), 0.0)
        if BACK:
            d1 = (tl.load(of_q, mask=in_q, other=0.0) + tl.load(of_k, mask=in_k, other=0.0)
                  + tl.load(of_v, mask=in_v, other=0.0)).to(tl.float32)  # fmt: skip
            d2 = (tl.load(of_q + half, mask=in_q, other=0.0) + tl.load(of_k + half, mask=in_k, other=0.0)
                  + tl.load(of_v + half, mask=in_v, other=0.0)).to(tl.float32)  # fmt: skip
            tl.store(of_y, d1 * c1 + d2 * s2, mask=inside)
            tl.store(of_y + half, d2 * c2 - d1 * s1, mask=inside)
        else:
            x1 = tl.load(of_y, mask=inside, other=0.0).to(tl.float32)
            x2 = tl.load(of_y + half, mask=inside, other=0.0).to(tl.float32)
            out1, out2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
            tl.store(of_q, out1, mask=in_q)
            tl.store(of_q + half, out2, mask=in_q)
            tl.store(of_k, out1, mask=in_k)
            tl.store(of_k + half, out2, mask=in_k)
            tl.store(of_v, out1, mask=in_v)
            tl.store(of_v + half, out2, mask=in_v)


def _turn(y: Tensor, parts: list[Tensor], cos: Tensor, sin: Tensor, *, back: bool) -> None:
    """Fill the parts from y, or with `back` y from the parts."""
    (batch, length, width), heads, kv = cos.shape, parts[0].shape[2], parts[1].shape[2]
    _rotate[(batch * length,)](
        y, *parts, cos.contiguous(), sin.contiguous(), heads, kv, width, BACK=back,
        HEADS=triton.next_power_of_2(heads + 2 * kv), HALF=triton.next_power_of_2(width // 2), num_warps=4,
    )  # fmt: skip
