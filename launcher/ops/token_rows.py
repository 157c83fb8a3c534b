"""The gradient that an embedding gives the rows of a few tokens; the matrix itself is frozen.

    d rows[i] = sum of d embedded[t] over the positions t whose token is i

It is computed as the product of a 0/1 matrix [n, N] with the gradients [N, D], in fp32: a fixed order of sums on every
device, where an index_add of a GPU adds in any order; the same shapes whether or not a token occurs; and nothing waits
for the device. It is done POSITIONS_AT_ONCE at a time, which bounds what it takes.

Letters: N positions (B * S), D model width, n rows.
"""

from typing import Any

import torch
from torch import Tensor

POSITIONS_AT_ONCE = 2048  # whose gradients exist in fp32 at once
NO_ROW = -1  # the slot of a token without a row


def with_row_gradients(embedded: Tensor, rows: Tensor, slots: Tensor, *, scale: float = 1.0) -> Tensor:
    """`embedded`, whose gradient reaches `rows` too.

    embedded [B, S, D]: what the embedding, which holds the values of rows [n, D] (fp32), gave, times `scale`; slots
    [B, S]: the row of each position's token, or NO_ROW.
    """
    embedded_with_rows: Tensor = _RowGradients.apply(embedded, rows, slots, scale)
    return embedded_with_rows


class _RowGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedded: Tensor, rows: Tensor, slots: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.scale, ctx.count = scale, len(rows)
        return embedded.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        return None, row_gradients(gradient.flatten(0, 1), slots.flatten(), ctx.count) * ctx.scale, None, None


def row_gradients(gradient: Tensor, slots: Tensor, count: int) -> Tensor:
    """gradient [N, D], slots [N] -> [count, D], fp32."""
    total = gradient.new_zeros(count, gradient.shape[1], dtype=torch.float32)
    numbers = torch.arange(count, dtype=slots.dtype, device=slots.device)[:, None]
    for start in range(0, len(slots), POSITIONS_AT_ONCE):
        chosen = (slots[start : start + POSITIONS_AT_ONCE] == numbers).float()
        total.addmm_(chosen, gradient[start : start + POSITIONS_AT_ONCE].float())
    return total


def row_gradients_reference(gradient: Tensor, slots: Tensor, count: int) -> Tensor:
    """The plain form. Same result."""
    has_row = slots != NO_ROW
    return torch.zeros(count, gradient.shape[1]).index_add_(0, slots[has_row].long(), gradient[has_row].float())
