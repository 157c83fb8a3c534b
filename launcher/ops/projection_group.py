"""What kernels share that serve up to three projections of one input in one launch."""

import importlib.util
from collections.abc import Sequence

from torch import Tensor

MOST = 3  # projections in a launch: query, key and value

HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def member(of_each, which):  # type: ignore[no-untyped-def]
        """The pointer at `which` of three."""
        return tl.where(which == 0, of_each[0], tl.where(which == 1, of_each[1], of_each[2]))


def three(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One to three tensors as the three that `member` chooses from; the last stands for those that are not there."""
    return (*tensors, *[tensors[-1]] * (MOST - len(tensors)))


def starts(sizes: Sequence[int]) -> tuple[int, int]:
    """Of up to three pieces side by side, where the second and the third begin; the end where there is none."""
    second = sizes[0]
    return second, sum(sizes[:2])
