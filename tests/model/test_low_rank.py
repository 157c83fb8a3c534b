"""The leading part of a decomposition: exact for narrow matrices, nearly the best product for others."""

import pytest
import torch

from launcher.model import low_rank
from launcher.model.low_rank import leading_svd


@pytest.mark.parametrize("exact", [0, 1024])
@pytest.mark.parametrize("shape", [(40, 300), (300, 200), (400, 300)])
def test_it_is_the_full_decomposition_where_the_values_fall(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], exact: int
) -> None:
    monkeypatch.setattr(low_rank, "EXACT_UP_TO", exact)
    torch.manual_seed(0)
    matrix = torch.randn(shape) * 0.97 ** torch.arange(shape[1])
    matrix[:, 0] *= 1000  # as the few large numbers in the inputs of trained models
    state = torch.get_rng_state()
    u, s, v = leading_svd(matrix, 8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    full_u, full_s, full_v = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close(s.double(), full_s[:8], rtol=1e-4, atol=0)
    torch.testing.assert_close((full_v[:8] @ v.double().T).abs(), torch.eye(8).double(), rtol=0, atol=3e-3)
    torch.testing.assert_close((full_u[:, :8].T @ u.double()).abs(), torch.eye(8).double(), rtol=0, atol=3e-3)
    torch.testing.assert_close((u.T @ matrix @ v.T).diagonal(), s, rtol=1e-4, atol=0)  # the signs belong together
    assert all(row[row.abs().argmax()] > 0 for row in v)


def test_of_nearly_equal_values_the_product_takes_nearly_all_that_the_best_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(low_rank, "EXACT_UP_TO", 0)
    matrix = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    best = torch.linalg.svdvals(matrix)[:16].square().sum()
    assert leading_svd(matrix, 16, seed=0)[1].square().sum() > 0.999 * best
    monkeypatch.setattr(low_rank, "ITERATIONS", 1)
    assert leading_svd(matrix, 16, seed=0)[1].square().sum() < 0.999 * best
