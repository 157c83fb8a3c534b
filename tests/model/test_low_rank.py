"""The leading part of a decomposition: exact for narrow matrices, nearly the best product for others."""

import pytest
import torch

from launcher.model.low_rank import leading_svd


@pytest.mark.parametrize("shape", [(40, 300), (300, 100), (400, 300)])
def test_it_is_the_full_decomposition_where_that_falls(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) * 0.97 ** torch.arange(shape[1])
    state = torch.get_rng_state()
    u, s, v = leading_svd(matrix, 8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    full_u, full_s, full_v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(s, full_s[:8], rtol=1e-4, atol=0)
    torch.testing.assert_close(u * s @ v, full_u[:, :8] * full_s[:8] @ full_v[:8], rtol=0, atol=1e-3)
    assert all(row[row.abs().argmax()] > 0 for row in v)


def test_of_nearly_equal_values_the_product_takes_nearly_all_that_the_best_would() -> None:
    matrix = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    best = torch.linalg.svdvals(matrix)[:16].square().sum()
    assert leading_svd(matrix, 16, seed=0)[1].square().sum() > 0.999 * best
    assert torch.svd_lowrank(matrix, q=16, niter=2)[1].square().sum() < 0.95 * best  # what the figure is for
