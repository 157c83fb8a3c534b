"""The weight that a QLoRA linear multiplies by: NF4 dequantised and the LoRA update added, in one pass.

Letters: D in-features, O out-features, r rank. Blocks of 64 consecutive elements of the [O, D] weight share a scale.

    W = code[nibble] * scale[block] + scaling * B A              A [r, D], B [O, r]
    scale[block] = code2[absmax[block]] * absmax2[block // 256] + offset       (double quantisation; QLoRA,
                                                                                arXiv:2305.14314, section 3)

One [O, D] matrix in the compute dtype is made, used for one product and forgotten: neither pass needs a product with A
or B on the way of the activations. A and B are rounded to the compute dtype, the sum is made in fp32 and
rounded once; the stock order rounds the base weight and the update's two products each on their own. An update smaller
than a weight's last bit is therefore seen through the rounding of many weights: without bias, since dequantised values
lie anywhere between two numbers of the dtype, but with the base's own rounding error on it. mode=parity measures both
orders against fp32. Without an update the result is bit-equal to bitsandbytes' own.

On CUDA one Triton launch a weight, elsewhere bitsandbytes' kernels and a product (`_plain`, also the reference).
"""

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 64  # elements that share a scale
BLOCK2 = 256  # scales that share a second-level scale


class Nf4(NamedTuple):
    """A quantised [O, D] weight. The last three are None where the scales are not quantised themselves."""

    packed: Tensor  # uint8 [O * D / 2, 1], the first of two elements in the high nibble
    absmax: Tensor  # uint8 [blocks] when doubly quantised, else fp32
    code: Tensor  # fp32 [16], the NF4 values
    absmax2: Tensor | None  # fp32 [blocks / 256, rounded up]
    code2: Tensor | None  # fp32 [256]
    offset: Tensor | None  # fp32 scalar


def merged_weight(base: Nf4, a: Tensor | None, b: Tensor | None, *, scaling: float, out: Tensor) -> Tensor:
    """Puts W into out [O, D], contiguous, in its dtype, and returns it; a [r, D] and b [O, r] fp32, or both None for
    the base alone."""
    if out.is_cuda and out.shape[1] % BLOCK == 0 and _TRITON:
        return _fused(base, a, b, scaling, out)
    return out.copy_(_plain(base, a, b, scaling, out.shape))


def _plain(base: Nf4, a: Tensor | None, b: Tensor | None, scaling: float, shape: torch.Size) -> Tensor:
    """In fp32 with bitsandbytes' kernels."""
    ops = torch.ops.bitsandbytes
    scales = base.absmax
    if base.offset is not None:
        scales = ops.dequantize_blockwise(base.absmax, base.absmax2, base.code2, BLOCK2, torch.float32) + base.offset
    weight: Tensor = ops.dequantize_4bit(base.packed, scales, BLOCK, "nf4", shape, torch.float32)
    if a is not None and b is not None:
        weight.addmm_(b, a, alpha=scaling)
    return weight


_TRITON = importlib.util.find_spec("triton") is not None

if _TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _merge(  # type: ignore[no-untyped-def]
        out, packed, absmax, code, absmax2, code2, offset, a, b, scaling, O, D, R,  # noqa: E741
        DOUBLE: tl.constexpr, STEPS: tl.constexpr, RANK: tl.constexpr, BO: tl.constexpr, BD: tl.constexpr,
    ):  # fmt: skip
        """A [BO, BD] tile of W. The update is added RANK columns of B at a time in STEPS, 0 without one."""
        rows = tl.program_id(1) * BO + tl.arange(0, BO)
        columns = tl.program_id(0) * BD + tl.arange(0, BD)
        in_row = tl.program_id(0) * (BD // 64) + tl.arange(0, BD // 64)
        blocks = rows[:, None] * (D // 64) + in_row[None, :]
        inside = (rows < O)[:, None] & (in_row < D // 64)[None, :]
        if DOUBLE:
            level = tl.load(code2 + tl.load(absmax + blocks, mask=inside, other=0))
            scale = level * tl.load(absmax2 + blocks // 256, mask=inside, other=0.0) + tl.load(offset)
        else:
            scale = tl.load(absmax + blocks, mask=inside, other=0.0)
        pairs = tl.load(
            packed + blocks[:, :, None] * 32 + tl.arange(0, 32)[None, None, :], mask=inside[:, :, None], other=0
        ).to(tl.int32)
        # A gather within the tile: 16 values in as many banks of shared memory, where loads would queue for one line.
        values = tl.load(code + tl.arange(0, 16))
        flat = tl.reshape(pairs, (BO * BD // 2,))
        high = tl.reshape(tl.gather(values, flat >> 4, 0), (BO, BD // 64, 32)) * scale[:, :, None]
        low = tl.reshape(tl.gather(values, flat & 15, 0), (BO, BD // 64, 32)) * scale[:, :, None]
        weight = tl.reshape(tl.join(high, low), (BO, BD))
        half = out.dtype.element_ty
        for step in tl.static_range(STEPS):
            k = step * RANK + tl.arange(0, RANK)
            b_tile = tl.load(b + rows[:, None] * R + k[None, :], mask=(rows < O)[:, None] & (k < R)[None, :], other=0.0)
            a_tile = tl.load(
                a + k[:, None] * D + columns[None, :], mask=(k < R)[:, None] & (columns < D)[None, :], other=0.0
            )
            if half == tl.float32:
                weight += scaling * tl.dot(b_tile, a_tile, input_precision="ieee")
            else:  # the compute copies of A and B, as everywhere else
                weight += scaling * tl.dot(b_tile.to(half), a_tile.to(half))
        tl.store(
            out + rows[:, None] * D + columns[None, :], weight.to(out.dtype.element_ty),
            mask=(rows < O)[:, None] & (columns < D)[None, :],
        )  # fmt: skip


def _fused(base: Nf4, a: Tensor | None, b: Tensor | None, scaling: float, out: Tensor) -> Tensor:
    out_features, in_features = out.shape
    rank = 0 if a is None else a.shape[0]
    unused = base.code  # a pointer that is not read
    tile: dict[str, Any] = {"BO": 64, "BD": 64, "num_warps": 4}
    columns = min(64, max(16, triton.next_power_of_2(rank)))  # what a dot product takes at once
    _merge[(triton.cdiv(in_features, tile["BD"]), triton.cdiv(out_features, tile["BO"]))](
        out,
        *(base.packed, base.absmax, base.code),
        *(unused if t is None else t for t in (base.absmax2, base.code2, base.offset, a, b)),
        scaling,
        *(out_features, in_features, rank),
        DOUBLE=base.offset is not None,
        STEPS=triton.cdiv(rank, columns),
        RANK=columns,
        enable_fp_fusion=False,  # bitsandbytes rounds the second-level product before it adds the offset
        **tile,
    )
    return out
