"""The gradients of a step and its loss in one flat fp32 buffer: one collective, one norm and one product for all.

    [ gradient of parameter 0 | pad | gradient of parameter 1 | pad | ... | loss | stop votes | pad ]

Every `parameter.grad` is a view into the buffer, so optimizers find their gradients as usual. Each gradient begins at
a multiple of 16 bytes, for vectorised loads. The padding stays zero and adds nothing to the norm. The ranks' buffers
are summed, not averaged: each micro batch has already divided by the global count of tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn

from launcher.runtime.progress import PROGRESS

ALIGNMENT = 4  # values of 4 bytes in 16 bytes


class FlatGradients:
    """Sets the `.grad` of each of `parameters` (fp32, one device). `loss_sum` and `stop_votes` are
    scalar views into the same buffer."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        assert all(p.dtype == torch.float32 for p in parameters), "LoRA masters are fp32"
        sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
        self._flat = torch.zeros(sum(sizes) + ALIGNMENT, device=parameters[0].device)
        self._gradients = self._flat[: sum(sizes)]
        self.loss_sum, self.stop_votes = self._flat[sum(sizes)], self._flat[sum(sizes) + 1]
        pieces = self._gradients.split(sizes)
        self._views = [piece[: p.numel()].view_as(p) for p, piece in zip(parameters, pieces, strict=True)]
        for parameter, view in zip(parameters, self._views, strict=True):
            parameter.grad = view

    def clear(self) -> None:
        self._flat.zero_()

    def add(self, gradients: Sequence[Tensor], loss: Tensor) -> None:
        """Add the gradients of a micro batch, in the order of the parameters, and its summed loss."""
        torch._foreach_add_(self._views, list(gradients))
        self.loss_sum += loss

    def reduce(self) -> None:
        """Sum over the ranks, in place, if there are several."""
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            PROGRESS.enter_collective()
            distributed.all_reduce(self._flat)

    def norm(self) -> Tensor:
        """Euclidean norm of all gradients together; not finite if any gradient is not."""
        return torch.linalg.vector_norm(self._gradients)

    def multiply(self, factor: Tensor) -> None:
        self._gradients.mul_(factor)
