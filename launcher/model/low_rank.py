"""The leading part of a singular value decomposition, for adapters that begin with one."""

import torch
from torch import Tensor

EXACT_UP_TO = 1024  # rows or columns up to which the product of the matrix with itself is decomposed whole
NEGLIGIBLE = 1e-6  # relative: a singular value that is the rounding of fp32
ITERATIONS = 16
WIDENING, LEAST_COLUMNS = 4, 128  # columns that are iterated for each that is wanted, and at least


@torch.no_grad()
def leading_svd(
    matrix: Tensor, rank: int, *, seed: int, iterations: int | None = None, spare: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, r], S [r] and V [r, D] of matrix [O, D], in fp32: the `rank` largest of its min(O, D) singular values,
    falling. The number furthest from zero in each row of V is positive, which settles the signs.

    Exact where the matrix has at most EXACT_UP_TO rows or columns. Else by subspace iteration (Halko et al.,
    arXiv:0909.4061, algorithm 4.4) from columns drawn from `seed`: of the rounding errors of NF4, whose singular values
    are nearly equal, U S V has 0.999 of the square sum that the best product of that rank has. Random states stay.
    `iterations`: so many, whatever the size. `spare`: columns beyond the rank, enough where the values fall.
    """
    matrix = matrix.float()
    if iterations is None and min(matrix.shape) <= EXACT_UP_TO:
        u, s, v = _exact(matrix, rank)
    else:
        u, s, v = _iterated(matrix, rank, ITERATIONS if iterations is None else iterations, spare, seed=seed)
    signs = v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
    return u * signs.T, s, v * signs


def _exact(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """From the eigenvectors on the shorter side; in fp64, since the product squares how far the values lie apart."""
    if matrix.shape[0] > matrix.shape[1]:
        v, s, u = _exact(matrix.T, rank)
        return u.T, s, v.T
    wide = matrix.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.T)  # rising
    u, s = vectors[:, -rank:].flip(1), squares[-rank:].flip(0).clamp(min=0).sqrt()
    v = u.T @ wide / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]
    return u.float(), s.float(), v.float()


def _iterated(
    matrix: Tensor, rank: int, iterations: int, spare: int | None, *, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    columns = min(max(WIDENING * rank, LEAST_COLUMNS) if spare is None else rank + spare, *matrix.shape)
    with torch.random.fork_rng([matrix.device] if matrix.device.type == "cuda" else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, q=columns, niter=iterations)
    return u[:, :rank], s[:rank], v[:, :rank].T
