"""Helpers of the kernels that handle up to three projections of one input in one launch."""

import importlib.util
from collections.abc import Sequence

from torch import Tensor

MAX_PROJECTIONS = 3  # in one launch: query, key and value

HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def member(pointers, which):  # type: ignore[no-untyped-def]
        """The pointer with number `which` of three."""
        return tl.where(which == 0, pointers[0], tl.where(which == 1, pointers[1], pointers[2]))


def three(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One to three tensors as the three that `member` chooses from; the last one is repeated."""
    return (*tensors, *[tensors[-1]] * (MAX_PROJECTIONS - len(tensors)))


def starts(sizes: Sequence[int]) -> tuple[int, int]:
    """Offsets of the second and the third of up to three adjacent pieces; the end where there is none."""
    second = sizes[0]
    return second, sum(sizes[:2])
