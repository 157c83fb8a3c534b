import pytest
import torch
from torch import nn

from launcher.ops.qlora_linear import qlora_linear, qlora_linear_reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("features", "out", "rank"), [(8, 8, 1), (24, 40, 3), (64, 128, 16)])
def test_equals_one_merged_matrix_with_gradients_in_the_fp32_masters(features, out, rank, dtype, tolerance):
    torch.manual_seed(0)
    base = nn.Linear(features, out, bias=False, dtype=dtype).requires_grad_(False)
    a, b = torch.randn(rank, features) / features**0.5, torch.randn(out, rank) / rank**0.5
    grads = []
    for form in (
        lambda x, a, b: qlora_linear(x, base, a, b, scaling=0.5, dropout=0.0),
        lambda x, a, b: qlora_linear_reference(x, base.weight, a, b, scaling=0.5),
    ):
        masters = [a.clone().requires_grad_(), b.clone().requires_grad_()]
        x = torch.linspace(-1, 1, 3 * features).view(3, features).to(dtype)
        y = form(x, *masters)
        y.float().square().sum().backward()
        grads.append((y.float(), *(m.grad for m in masters)))
        assert all(m.grad.dtype == torch.float32 for m in masters)
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance * plain.abs().max().item())


def test_dropout_acts_where_gradients_are_recorded_and_only_there():
    torch.manual_seed(0)
    base = nn.Linear(32, 32, bias=False)
    a, b, x = torch.randn(4, 32), torch.randn(32, 4), torch.randn(2, 32)
    exact = qlora_linear(x, base, a, b, scaling=1.0, dropout=0.0)
    with torch.no_grad():
        assert torch.equal(qlora_linear(x, base, a, b, scaling=1.0, dropout=0.5), exact)
    assert not torch.allclose(qlora_linear(x, base, a, b, scaling=1.0, dropout=0.5), exact)
