"""The rows of a few tokens get the gradient that an embedding whose every row is trained gives them."""

import pytest
import torch
import torch.nn.functional as F

from launcher.ops.token_rows import (
    NO_ROW,
    POSITIONS_AT_ONCE,
    row_gradients,
    row_gradients_reference,
    with_row_gradients,
)


@pytest.mark.parametrize(("positions", "width", "count"), [(1, 3, 1), (7, 16, 3), (POSITIONS_AT_ONCE + 5, 8, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_the_sum_over_positions(positions: int, width: int, count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(positions, width, generator=generator).to(dtype)
    slots = torch.randint(NO_ROW, count, (positions,), generator=generator, dtype=torch.int32)
    expected = row_gradients_reference(gradient, slots, count)
    torch.testing.assert_close(row_gradients(gradient, slots, count), expected, rtol=1e-5, atol=1e-5)
    assert row_gradients(gradient, slots, count).dtype == torch.float32
    assert positions == 1 or expected.abs().max() > 0.1


def test_rows_get_what_an_embedding_gives_them_and_the_output_is_the_embeddings() -> None:
    weight, ids = torch.randn(11, 4, requires_grad=True), torch.tensor([[3, 0, 3], [7, 3, 9]])
    factors = torch.randn(2, 3, 4)
    (2.5 * F.embedding(ids, weight) * factors).sum().backward()
    assert weight.grad is not None
    rows = weight[[3, 5]].detach().clone().requires_grad_()
    slots = torch.full((11,), NO_ROW, dtype=torch.int32)
    slots[torch.tensor([3, 5])] = torch.arange(2, dtype=torch.int32)
    embedded = 2.5 * F.embedding(ids, weight.detach())
    output = with_row_gradients(embedded, rows, slots[ids], scale=2.5)
    (output * factors).sum().backward()
    assert torch.equal(output, embedded) and rows.grad is not None
    torch.testing.assert_close(rows.grad, weight.grad[[3, 5]])
    assert rows.grad[0].any() and not rows.grad[1].any()  # token 5 does not occur
