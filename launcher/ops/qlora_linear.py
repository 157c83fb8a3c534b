"""The product of a frozen (quantised) linear and its LoRA update.

Letters: D in-features, O out-features, r rank.

    y = base(x) + scaling * (dropout(x) A^T) B^T            A [r, D], B [O, r]          (LoRA, arXiv:2106.09685, eq. 3)

A and B are fp32 masters; the compute copies are cast here, inside the graph, so the optimizer works on full precision
and the matrix products run in x's dtype. No autocast is involved.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def qlora_linear(
    x: Tensor, base: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, *, scaling: float, dropout: float
) -> Tensor:
    """x [..., D] -> [..., O] in x's dtype. Dropout acts where gradients are recorded, so that evaluation is exact."""
    update = F.dropout(x, dropout, training=True) if dropout > 0 and torch.is_grad_enabled() else x
    update = F.linear(F.linear(update, a.to(x.dtype)), b.to(x.dtype))
    return base(x) + update * scaling


def qlora_linear_reference(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """The plain form on a dequantised weight [O, D], everything in fp32: one merged matrix."""
    merged = weight.float() + scaling * (b.float() @ a.float())
    return F.linear(x.float(), merged)
