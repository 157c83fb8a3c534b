"""The weight of a QLoRA linear: NF4 dequantised and the LoRA update added, in one pass.

Letters: D in-features, O out-features, r rank. Blocks of 64 consecutive elements of the [O, D] weight share a scale.

    W = code[nibble] * scale[block] + scaling * B A              A [r, D], B [O, r]
    scale[block] = code2[absmax[block]] * absmax2[block // 256] + offset       (double quantisation; QLoRA,
                                                                                arXiv:2305.14314, section 3)

It is one [O, D] matrix in the compute dtype, used for one product and then freed: activations need no products with A
or B in either pass. A and s B are rounded to the compute dtype, the sum is computed in fp32 and rounded once; the stock
order rounds the base weight and both products of the update separately. An update smaller than a weight's last bit
still shows, through the rounding of many weights, with the base's rounding error added. With double quantisation that
is without bias: dequantised values lie anywhere between two numbers of the dtype. With quant.double=false the scales
are weights of the half-precision checkpoint, so the values have few places between two numbers, and an update that
reaches no rounding boundary from them is lost. Measured in bf16, the share of an update that arrives was 0.45 at
|B| = 2e-6 and 0.96 at 2e-4; no effect on training was found. mode=parity measures both orders against
fp32. Without an update the result is bit-equal to bitsandbytes' own.

On CUDA one Triton launch computes all weights of a product. Elsewhere bitsandbytes' kernels and a matrix product do it
(`plain_merged_weight`, which is also the reference).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from launcher.ops.projection_group import HAS_TRITON, MAX_PROJECTIONS, starts, three

BLOCK = 64  # elements that share a scale
BLOCK2 = 256  # scales that share a second-level scale


class Nf4(NamedTuple):
    """A quantised [O, D] weight. The last three are None where the scales are not quantised."""

    packed: Tensor  # uint8 [O * D / 2, 1], the first of two elements in the high nibble
    absmax: Tensor  # uint8 [blocks] when doubly quantised, else fp32
    code: Tensor  # fp32 [16], the NF4 values
    absmax2: Tensor | None = None  # fp32 [blocks / 256, rounded up]
    code2: Tensor | None = None  # fp32 [256]
    offset: Tensor | None = None  # fp32 scalar


def merged_weights(
    bases: Sequence[Nf4], a: Sequence[Tensor], b: Sequence[Tensor], *, scaling: float, outs: Sequence[int], out: Tensor
) -> Tensor:
    """Write W of each base, stacked, into out [sum of O, D] (contiguous, any dtype); returns out. a: [r, D] and b:
    [O, r] for each base, fp32; or none of them for the bases without an update."""
    fused = out.is_cuda and out.shape[1] % BLOCK == 0 and HAS_TRITON
    if fused and out.numel() < 2**31 and _in_one_launch(bases, a, outs):
        return _fused(bases, a, b, scaling, outs, out)
    for i, rows in enumerate(out.split(list(outs))):
        if fused:
            _fused(bases[i : i + 1], a[i : i + 1], b[i : i + 1], scaling, outs[i : i + 1], rows)
        else:
            update = a[i] if a else None, b[i] if b else None, scaling
            rows.copy_(plain_merged_weight(bases[i], *update, rows.shape, rows.dtype))
    return out


def plain_merged_weight(
    base: Nf4, a: Tensor | None, b: Tensor | None, scaling: float, shape: torch.Size, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The plain form of one weight [O, D], in fp32 with bitsandbytes' kernels. A and s B are rounded to `dtype`, as the
    Triton kernel rounds them."""
    ops = torch.ops.bitsandbytes
    scales = base.absmax
    if base.offset is not None:
        scales = ops.dequantize_blockwise(base.absmax, base.absmax2, base.code2, BLOCK2, torch.float32) + base.offset
    weight: Tensor = ops.dequantize_4bit(base.packed, scales, BLOCK, "nf4", shape, torch.float32)
    if a is not None and b is not None:
        weight.addmm_((b * scaling).to(dtype).float(), a.to(dtype).float())
    return weight


if HAS_TRITON:
    import triton
    import triton.language as tl

    from launcher.ops.projection_group import member

    @triton.jit
    def _update(a, b, which, rows, columns, inside, k, D, R):  # type: ignore[no-untyped-def]
        """Loads columns k of B, for its rows where `inside`, and rows k of A."""
        b_tile = tl.load(
            member(b, which) + rows[:, None] * R + k[None, :], mask=inside[:, None] & (k < R)[None, :], other=0.0
        )
        a_tile = tl.load(
            member(a, which) + k[:, None] * D + columns[None, :],
            mask=(k < R)[:, None] & (columns < D)[None, :], other=0.0,
        )  # fmt: skip
        return b_tile, a_tile

    @triton.jit
    def merge_kernel(  # type: ignore[no-untyped-def]
        out, packed, absmax, code, absmax2, code2, offset, a, b, scaling, O, D, R, second, third,  # noqa: E741
        DOUBLE: tl.constexpr, STEPS: tl.constexpr, RANK: tl.constexpr, BO: tl.constexpr, BD: tl.constexpr,
    ):  # fmt: skip
        """Computes a [BO, BD] tile of up to three stacked W, of which the second and third start at these rows. The
        update is added in STEPS of RANK columns of B; without an update STEPS is 0.

        All loads come first: none starts after a barrier, so a tile waits for memory once."""
        top = tl.program_id(1) * BO
        which = (top >= second).to(tl.int32) + (top >= third).to(tl.int32)
        rows, k = top + tl.arange(0, BO), tl.arange(0, RANK)
        columns = tl.program_id(0) * BD + tl.arange(0, BD)
        in_row = tl.program_id(0) * (BD // 64) + tl.arange(0, BD // 64)
        inside = (rows < O)[:, None] & (in_row < D // 64)[None, :]
        mine = rows - tl.where(which == 0, 0, tl.where(which == 1, second, third))
        blocks = mine[:, None] * (D // 64) + in_row[None, :]
        level = tl.load(member(absmax, which) + blocks, mask=inside, other=0)
        pairs = tl.load(
            member(packed, which) + blocks[:, :, None] * 32 + tl.arange(0, 32)[None, None, :],
            mask=inside[:, :, None], other=0,
        )  # fmt: skip
        values = tl.load(member(code, which) + tl.arange(0, 16))
        if DOUBLE:
            level2 = tl.load(member(absmax2, which) + blocks // 256, mask=inside, other=0.0)
        if STEPS:
            b_tile, a_tile = _update(a, b, which, mine, columns, rows < O, k, D, R)
        if DOUBLE:
            level = tl.load(member(code2, which) + level) * level2 + tl.load(member(offset, which))
        # A gather within the tile: the 16 values lie in 16 banks of shared memory; loads would queue for one line.
        pairs = pairs.to(tl.int32)
        both = tl.gather(values, tl.reshape(tl.join(pairs >> 4, pairs & 15), (BO * BD,)), 0)
        weight = tl.reshape(tl.reshape(both, (BO, BD // 64, 64)) * level[:, :, None], (BO, BD))
        half = out.dtype.element_ty
        for step in tl.static_range(STEPS):
            if step:
                b_tile, a_tile = _update(a, b, which, mine, columns, rows < O, step * RANK + k, D, R)
            if half == tl.float32:
                weight = tl.dot(scaling * b_tile, a_tile, weight, input_precision="ieee")
            else:  # the compute copies of A and B, as everywhere else
                weight = tl.dot((scaling * b_tile).to(half), a_tile.to(half), weight)
        tl.store(
            out + rows[:, None] * D + columns[None, :],
            weight.to(half),
            mask=(rows < O)[:, None] & (columns < D)[None, :],
        )


TILE = 64  # rows and columns of a program's tile


def _in_one_launch(bases: Sequence[Nf4], a: Sequence[Tensor], outs: Sequence[int]) -> bool:
    """Whether one launch can do them all: they are of one kind, and no tile lies in two of them."""
    kinds = {(base.offset is None, *(p.shape[0] for p in a[i : i + 1])) for i, base in enumerate(bases)}
    return len(outs) <= MAX_PROJECTIONS and len(kinds) == 1 and not any(rows % TILE for rows in outs[:-1])


def _fused(
    bases: Sequence[Nf4], a: Sequence[Tensor], b: Sequence[Tensor], scaling: float, outs: Sequence[int], out: Tensor
) -> Tensor:
    rows, in_features = out.shape
    rank = a[0].shape[0] if a else 0
    columns = min(64, max(16, triton.next_power_of_2(rank)))  # of B in one dot product
    unused = bases[0].code  # any pointer: it is not read
    fields = [[unused if t is None else t for t in column] for column in zip(*bases, strict=True)]
    merge_kernel[(triton.cdiv(in_features, TILE), triton.cdiv(rows, TILE))](
        out,
        *(three(column) for column in (*fields, a or [unused], b or [unused])),
        scaling,
        *(rows, in_features, rank),
        *starts(outs),
        DOUBLE=bases[0].offset is not None,
        STEPS=triton.cdiv(rank, columns),
        RANK=columns,
        BO=TILE,
        BD=TILE,
        num_warps=4,
        enable_fp_fusion=False,  # bitsandbytes rounds the second-level product before it adds the offset
    )
    return out
