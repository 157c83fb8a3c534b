"""The leading part of a singular value decomposition, for adapters that begin with one."""

import torch
from torch import Tensor

ITERATIONS = 16
WIDENING, LEAST_COLUMNS = 4, 128  # columns that are iterated for each that is wanted, and at least


@torch.no_grad()
def leading_svd(matrix: Tensor, rank: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, r], S [r] and V [r, D] of matrix [O, D], in fp32: the `rank` largest of its min(O, D) singular values,
    falling. The number furthest from zero in each row of V is positive, which settles the signs.

    By subspace iteration (Halko et al., arXiv:0909.4061, algorithm 4.4) from columns drawn from `seed`; exact where the
    matrix has at most LEAST_COLUMNS rows or columns. Of the rounding errors of NF4, whose singular values are nearly
    equal, U S V then has 0.999 of the square sum that the best product of that rank has. Random states stay.
    """
    columns = min(max(WIDENING * rank, LEAST_COLUMNS), *matrix.shape)
    with torch.random.fork_rng([matrix.device] if matrix.device.type == "cuda" else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix.float(), q=columns, niter=ITERATIONS)
    u, s, v = u[:, :rank], s[:rank], v[:, :rank].T
    signs = v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
    return u * signs.T, s, v * signs
