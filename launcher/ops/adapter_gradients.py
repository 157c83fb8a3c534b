"""Gradients of LoRA's A and B: products of a large matrix with one of r columns, bound by reading the large one.

Letters: N tokens, D in-features, O out-features, r rank; M columns of the matrix at hand (D or O).

    dA = s (dy B)^T x,   dB = s dy^T (x A^T)                    x [N, D], dy [N, O], A [r, D], B [O, r]

Four products, each of which reads x or dy. The wider of the two is needed for two of them, one that gives r columns a
token and one that sums over the tokens, and `_tall` makes the two in one pass. For O >= D:

    _thin    t = x A^T              reads x; also clears the sums below
    _tall    dB = dy^T t, u = dy B  reads dy
    _tall    dA = u^T x             reads x

and with x and dy, A and B exchanged for O < D. Sums over blocks are added in memory, in fp32 and in whatever order the
blocks end: two runs of one step agree to rounding, as with the attention kernels. The fp32 masters are rounded to the
compute dtype as they are read.
"""

import importlib.util

import torch
from torch import Tensor

MAX_RANK = 64  # beyond it the tiles no longer fit a multiprocessor's registers, and the products are not thin

HAS_TRITON = importlib.util.find_spec("triton") is not None


def gradients(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """dy [N, O], x [N, D], a [r, D], b [O, r], the last two fp32 -> dA [r, D], dB [O, r], fp32."""
    if not (x.is_cuda and HAS_TRITON and a.shape[0] <= MAX_RANK and x.dtype != torch.float32):
        return plain_gradients(dy, x, a, b, scaling)
    da, db = torch.empty_like(a), torch.empty_like(b)
    wide, narrow = (dy, x) if dy.shape[1] >= x.shape[1] else (x, dy)
    of_wide, of_narrow = ((b, db), (a.T, da.T)) if wide is dy else ((a.T, da.T), (b, db))
    t, u = _thin_product(narrow, of_narrow[0], scaling, cleared=(da, db))
    _tall_product(wide, t, of_wide[1], (of_wide[0], scaling, u))
    _tall_product(narrow, u, of_narrow[1])
    return da, db


def plain_gradients(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The plain form, on any device and for any rank."""
    scaled_a, scaled_b = (a * scaling).to(x.dtype), (b * scaling).to(x.dtype)
    return _wide_sum((dy @ scaled_b).T, x), _wide_sum(dy.T, x @ scaled_a.T)


def _wide_sum(p: Tensor, q: Tensor) -> Tensor:
    """p q with an fp32 result: a sum over thousands of tokens is not rounded to half precision."""
    if p.is_cuda and p.dtype != torch.float32:
        return torch.mm(p, q, out_dtype=torch.float32)
    return (p @ q).float()


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _thin(  # type: ignore[no-untyped-def]
        out, sums, x, c, scaling, N, M, R, cm, cr, first_cleared, first_size, second_cleared, second_size,
        RANK: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, SHARE: tl.constexpr,
    ):  # fmt: skip
        """BN rows of out [N, R] = scaling * x [N, M] c [M, R]; cm and cr are c's strides. Clears as many rows of `sums`
        and SHARE elements of each of two other tensors."""
        row, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, RANK)
        total = tl.zeros((BN, RANK), tl.float32)
        where = (row < N)[:, None] & (k < R)[None, :]
        tl.store(sums + row[:, None] * R + k[None, :], total, mask=where)
        part, nothing = tl.program_id(0) * SHARE + tl.arange(0, SHARE), tl.zeros((SHARE,), tl.float32)
        tl.store(first_cleared + part, nothing, mask=part < first_size)
        tl.store(second_cleared + part, nothing, mask=part < second_size)
        for first in range(0, M, BM):
            column = first + tl.arange(0, BM)
            x_tile = tl.load(
                x + row[:, None].to(tl.int64) * M + column[None, :],
                mask=(row < N)[:, None] & (column < M)[None, :], other=0.0,
            )  # fmt: skip
            c_tile = tl.load(
                c + column[:, None] * cm + k[None, :] * cr, mask=(column < M)[:, None] & (k < R)[None, :], other=0.0
            )
            total = tl.dot(x_tile, c_tile.to(x_tile.dtype), total)
        tl.store(out + row[:, None] * R + k[None, :], (total * scaling).to(out.dtype.element_ty), mask=where)

    @triton.jit
    def _tall(  # type: ignore[no-untyped-def]
        g, gm, gr, x, t, N, M, R, SPAN, u, c, cm, cr, scaling,
        BOTH: tl.constexpr, RANK: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    ):  # fmt: skip
        """Adds, over SPAN rows and BM columns of x [N, M], x^T t to g [M, R] of strides gm, gr and, if BOTH, scaling *
        x c to u [N, R]; c [M, R] has the strides cm, cr."""
        column, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, RANK)
        of_g = (column < M)[:, None] & (k < R)[None, :]
        half = x.dtype.element_ty
        if BOTH:
            c_tile = (tl.load(c + column[:, None] * cm + k[None, :] * cr, mask=of_g, other=0.0) * scaling).to(half)
        total = tl.zeros((BM, RANK), tl.float32)
        for first in range(tl.program_id(1) * SPAN, (tl.program_id(1) + 1) * SPAN, BN):
            row = first + tl.arange(0, BN)
            of_t = (row < N)[:, None] & (k < R)[None, :]
            t_tile = tl.load(t + row[:, None] * R + k[None, :], mask=of_t, other=0.0).to(half)
            x_tile = tl.load(
                x + row[:, None].to(tl.int64) * M + column[None, :],
                mask=(row < N)[:, None] & (column < M)[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(tl.trans(x_tile), t_tile, total)
            if BOTH:
                tl.atomic_add(u + row[:, None] * R + k[None, :], tl.dot(x_tile, c_tile), mask=of_t, sem="relaxed")
        tl.atomic_add(g + column[:, None] * gm + k[None, :] * gr, total, mask=of_g, sem="relaxed")


def _thin_product(x: Tensor, c: Tensor, scaling: float, *, cleared: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """scaling * x c in x's dtype, x [N, M], c [M, r] of any strides -> [N, r]; and fp32 zeros of that shape. Puts zeros
    into the two tensors of `cleared`."""
    (rows, columns), rank = x.shape, c.shape[1]
    out = torch.empty(rows, rank, dtype=x.dtype, device=x.device)
    sums = torch.empty(rows, rank, device=x.device)
    block = 32
    blocks = triton.cdiv(rows, block)
    share = triton.next_power_of_2(triton.cdiv(max(t.numel() for t in cleared), blocks))
    first, second = cleared
    _thin[(blocks,)](
        out, sums, x, c, scaling, rows, columns, rank, *c.stride(), first, first.numel(), second, second.numel(),
        RANK=_padded(rank), BN=block, BM=256, SHARE=share, num_stages=4,
    )  # fmt: skip
    return out, sums


def _tall_product(x: Tensor, t: Tensor, gradient: Tensor, thin: tuple[Tensor, float, Tensor] | None = None) -> None:
    """Adds x^T t to `gradient` [M, r]; x [N, M], t [N, r]. With `thin` = (c [M, r], scaling, sums [N, r]) also
    scaling * x c to the sums, from the same reading of x."""
    (rows, columns), rank = x.shape, t.shape[1]
    c, scaling, sums = thin or (gradient, 1.0, t)
    block = 64 if thin is None else 256 if columns >= 2048 and rank <= 32 else 128
    blocks = triton.cdiv(columns, block)
    parts = min(16, triton.cdiv(512 if thin is None else 256, blocks))
    span = triton.cdiv(triton.cdiv(rows, parts), 64) * 64  # a multiple of the tile's rows
    _tall[(blocks, triton.cdiv(rows, span))](
        gradient, *gradient.stride(), x, t, rows, columns, rank, span, sums, c, *c.stride(), scaling,
        BOTH=thin is not None, RANK=_padded(rank), BN=64, BM=block,
    )  # fmt: skip


def _padded(rank: int) -> int:
    """The least width of a dot product that holds `rank`."""
    return max(16, triton.next_power_of_2(rank))
