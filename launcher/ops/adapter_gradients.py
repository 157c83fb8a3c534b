"""Gradients of LoRA's A and B: products of a large matrix and one of r columns, limited by reading the large one.

Letters: N tokens, D in-features, O out-features, r rank, n projections of one x. In a kernel, M columns of the large
matrix and R of the thin one.

    dA = s (dy B)^T x,   dB = s dy^T (x A^T)                    x [N, D], dy [N, O], A [r, D], B [O, r]

These are four products, each of which reads x or dy. One of the two is needed twice: for a product with r columns per
token and for one that sums over the tokens. `tall_kernel` computes both in one pass. For n projections, with their A
stacked:

    thin_kernel    t = x [A A ...]^T        reads x; also zeroes the sums below
    tall_kernel    dB = dy^T t, u = dy B    reads dy; each projection has its own columns of t and u
    tall_kernel    [dA dA ...] = u^T x      reads x

For a single projection with O < D, x and dy, A and B swap roles, so that the wider matrix is read once. Partial sums
are added in memory in fp32, in whatever order the programs finish: two runs of a step agree up to rounding, as with the
attention kernels. Where torch is told to be deterministic (train.deterministic) the plain form is used. The fp32
masters are rounded to the compute dtype when they are read.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from launcher.ops.projection_group import HAS_TRITON, MAX_PROJECTIONS, starts, three

MAX_RANK = 128  # of the stacked A: beyond it the tiles do not fit a multiprocessor, and the products are not thin


def gradients(dy: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scaling: float) -> tuple[Tensor, Tensor]:
    """The gradients of n projections of x [N, D]. dy [N, sum of O] is side by side; a: n of [r, D], b: n of [O, r],
    fp32 -> dA [n r, D] and dB [sum of O, r], fp32, stacked in the same order."""
    outs, rank = [q.shape[0] for q in b], sum(p.shape[0] for p in a)
    kinds = {(p.shape, p.stride(), q.shape[1], q.stride()) for p, q in zip(a, b, strict=True)}
    together = len(outs) <= MAX_PROJECTIONS and len(kinds) == 1 and not any(out % 16 for out in outs[:-1])
    if not (_is_thin(x, rank) and together):
        projections = zip(dy.split(outs, 1), a, b, strict=True)
        pairs = [plain_gradients(its_dy, x, its_a, its_b, scaling) for its_dy, its_a, its_b in projections]
        return torch.cat([da for da, _ in pairs]), torch.cat([db for _, db in pairs])
    da = torch.empty(rank, x.shape[1], device=x.device)
    db = torch.empty(sum(outs), b[0].shape[1], device=x.device)
    a_transposed = [p.T for p in a]
    if len(a) == 1 and x.shape[1] > outs[0]:
        t, u = _thin_product(dy, b, scaling, cleared=(da, db))
        _tall_product(x, t, da.T, thin=(a_transposed, scaling, u))
        _tall_product(dy, u, db)
        return da, db
    t, u = _thin_product(x, a_transposed, scaling, cleared=(da, db))
    _tall_product(dy, t, db, thin=(b, scaling, u), outs=outs)
    _tall_product(x, u, da.T)
    return da, db


def _is_thin(x: Tensor, rank: int) -> bool:
    """Whether the kernels support stacked adapters of this rank for matrices like x, and may add in any order."""
    supported = x.is_cuda and HAS_TRITON and rank <= MAX_RANK and x.dtype != torch.float32
    return supported and not torch.are_deterministic_algorithms_enabled()


def plain_gradients(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The plain form of one projection, on any device and for any rank. It rounds s A and s B; of the two factors, the
    kernels scale one before and one after its product. The difference is nothing where s is a power of two."""
    scaled_a, scaled_b = (a * scaling).to(x.dtype), (b * scaling).to(x.dtype)
    return _wide_sum((dy @ scaled_b).T, x), _wide_sum(dy.T, x @ scaled_a.T)


def _wide_sum(p: Tensor, q: Tensor) -> Tensor:
    """p @ q with an fp32 result: a sum over thousands of tokens must not be rounded to half precision."""
    if p.is_cuda and p.dtype != torch.float32:
        return torch.mm(p, q, out_dtype=torch.float32)
    return (p @ q).float()


if HAS_TRITON:
    import triton
    import triton.language as tl

    from launcher.ops.projection_group import member

    @triton.jit
    def thin_kernel(  # type: ignore[no-untyped-def]
        out, sums, x, c, scaling, N, M, R, width, cm, cr, first_cleared, first_size, second_cleared, second_size,
        share, RANK: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, PIECE: tl.constexpr,
    ):  # fmt: skip
        """Computes BN rows of out [N, R] = scaling * x [N, M] c [M, R]; c is up to three matrices of `width` columns
        side by side, of strides cm and cr. Zeroes the same rows of `sums`, and `share` elements of each of two other
        tensors, PIECE at once."""
        row, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, RANK)
        total = tl.zeros((BN, RANK), tl.float32)
        where = (row < N)[:, None] & (k < R)[None, :]
        tl.store(sums + row[:, None] * R + k[None, :], total, mask=where)
        for piece in range(0, share, PIECE):
            place, nothing = tl.program_id(0) * share + piece + tl.arange(0, PIECE), tl.zeros((PIECE,), tl.float32)
            tl.store(first_cleared + place, nothing, mask=place < first_size)
            tl.store(second_cleared + place, nothing, mask=place < second_size)
        for first in range(0, M, BM):
            column = first + tl.arange(0, BM)
            x_tile = tl.load(
                x + row[:, None].to(tl.int64) * M + column[None, :],
                mask=(row < N)[:, None] & (column < M)[None, :], other=0.0,
            )  # fmt: skip
            c_tile = tl.load(
                member(c, k // width)[None, :] + column[:, None] * cm + (k % width)[None, :] * cr,
                mask=(column < M)[:, None] & (k < R)[None, :],
                other=0.0,
            )
            total = tl.dot(x_tile, c_tile.to(x_tile.dtype), total)
        tl.store(out + row[:, None] * R + k[None, :], (total * scaling).to(out.dtype.element_ty), mask=where)

    @triton.jit
    def tall_kernel(  # type: ignore[no-untyped-def]
        g, gm, gr, x, t, tn, N, M, R, SPAN, u, un, c, cm, cr, scaling, second, third,
        BOTH: tl.constexpr, RANK: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    ):  # fmt: skip
        """Adds, for SPAN rows and BM columns of x [N, M], x^T t to g [M, R] and, if BOTH, scaling * x c to u [N, R],
        c [M, R]. Strides: gm, gr of g, cm, cr of c, tn, un of the rows of t and u. From columns `second` and `third`
        of x on, the next c and the next R columns of t and u are used."""
        column, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, RANK)
        of_g = (column < M)[:, None] & (k < R)[None, :]
        half = x.dtype.element_ty
        left = tl.program_id(0) * BM
        which = (left >= second).to(tl.int32) + (left >= third).to(tl.int32)
        place = R * which
        if BOTH:
            mine = column - tl.where(which == 0, 0, tl.where(which == 1, second, third))
            c_tile = tl.load(member(c, which) + mine[:, None] * cm + k[None, :] * cr, mask=of_g, other=0.0)
            c_tile = (c_tile * scaling).to(half)
        total = tl.zeros((BM, RANK), tl.float32)
        for first in range(tl.program_id(1) * SPAN, (tl.program_id(1) + 1) * SPAN, BN):
            row = first + tl.arange(0, BN)
            of_t = (row < N)[:, None] & (k < R)[None, :]
            t_tile = tl.load(t + place + row[:, None] * tn + k[None, :], mask=of_t, other=0.0).to(half)
            x_tile = tl.load(
                x + row[:, None].to(tl.int64) * M + column[None, :],
                mask=(row < N)[:, None] & (column < M)[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(tl.trans(x_tile), t_tile, total)
            if BOTH:
                add = tl.dot(x_tile, c_tile)
                tl.atomic_add(u + place + row[:, None] * un + k[None, :], add, mask=of_t, sem="relaxed")
        tl.atomic_add(g + column[:, None] * gm + k[None, :] * gr, total, mask=of_g, sem="relaxed")


def _thin_product(
    x: Tensor, c: Sequence[Tensor], scaling: float, *, cleared: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """x [N, M], n matrices c [M, R / n] of the same strides -> scaling * x [c c ...] [N, R] in x's dtype, and fp32
    zeros of that shape. Also zeroes the two tensors of `cleared`."""
    (rows, columns), rank = x.shape, sum(matrix.shape[1] for matrix in c)
    out = torch.empty(rows, rank, dtype=x.dtype, device=x.device)
    sums = torch.empty(rows, rank, device=x.device)
    wide, width = 128 if rank <= 64 else 64, _padded(rank)
    block = 16 if rows <= 2048 else 32 if rows <= 8192 else 64  # 128 to 256 programs: one or two per multiprocessor
    if rank <= 16 and block < 64:
        wide = 256
    blocks = triton.cdiv(rows, block)
    piece = 1024
    share = triton.cdiv(triton.cdiv(max(t.numel() for t in cleared), blocks), piece) * piece
    first, second = cleared
    thin_kernel[(blocks,)](
        out, sums, x, three(c), scaling, rows, columns, rank, c[0].shape[1], *c[0].stride(),
        first, first.numel(), second, second.numel(), share, RANK=width, BN=block, BM=wide, PIECE=piece,
        num_stages=_stages(x, block * wide * 2 + wide * width * 4, limit=3), num_warps=8 if block == 64 else 4,
    )  # fmt: skip
    return out, sums


def _tall_product(
    x: Tensor,
    t: Tensor,
    gradient: Tensor,
    *,
    thin: tuple[Sequence[Tensor], float, Tensor] | None = None,
    outs: Sequence[int] = (),
) -> None:
    """Adds x^T t to `gradient` [M, R]; x [N, M], t [N, R]. With `thin` = ([c [M, R]], scaling, sums [N, R]), adds
    scaling * x c to the sums too, while x is read.

    With `outs`, x holds the columns of n projections, `outs` of each, with n matrices c; t and sums are [N, n R].
    """
    (rows, columns), rank = x.shape, gradient.shape[1]
    c, scaling, sums = thin or ([gradient], 1.0, t)
    block = 64 if thin is None else 256 if columns >= 2048 and rows >= 4096 and rank <= 32 else 128
    width = _padded(rank)
    while block > 16 and 64 * block * 2 + 64 * width * 4 + block * width * 2 > shared_memory(x) * 3 // 5:
        block //= 2  # the tiles of x, t and c must fit into it together
    second, third = starts(outs or [columns])
    while any(start % block for start in (second, third) if start < columns):
        block //= 2  # a tile must not lie in two projections
    blocks = triton.cdiv(columns, block)
    parts = min(16, triton.cdiv(128 if block == 256 else 256, blocks))
    span = triton.cdiv(triton.cdiv(rows, parts), 64) * 64  # a multiple of a tile's rows
    tall_kernel[(blocks, triton.cdiv(rows, span))](
        gradient, *gradient.stride(), x, t, t.stride(0), rows, columns, rank, span, sums, sums.stride(0), three(c),
        *c[0].stride(), scaling, second, third, BOTH=thin is not None, RANK=width, BN=64, BM=block,
        num_stages=_stages(x, 64 * block * 2 + 64 * width * t.element_size(), limit=3),
    )  # fmt: skip


def _padded(rank: int) -> int:
    """The smallest width of a Triton dot product that holds `rank`."""
    return max(16, triton.next_power_of_2(rank))


def _stages(x: Tensor, tile_bytes: int, *, limit: int) -> int:
    """How many tiles to load ahead: as many as fit into two thirds of a multiprocessor's shared memory."""
    return max(1, min(limit, shared_memory(x) * 2 // 3 // tile_bytes))


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that a program may use."""
    device: Any = torch.cuda.get_device_properties(x.device)
    return int(device.shared_memory_per_block_optin)
