"""Sends a micro batch to the device in one copy, always to the same place for batches of one shape.

    host     [ input_ids | labels | position_ids | document_ids | cu_seqlens | factor ]    int32, pinned, new each time
    device   the same                                                                      int32, static

A captured graph reads fixed addresses, and launching a copy costs the host more than its bytes do: hence one buffer for
all fields. Token ids, labels and positions travel as int32 and are cast to int64, which the model takes, on the device.
Each field begins at a multiple of 16 bytes. The caching host allocator reuses a host buffer only once its copy is over.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from launcher.train.gradients import ALIGNMENT


class Staging:
    """The static buffer for micro batches with the shapes of `fields`: their tensors, int64 before int32."""

    def __init__(self, fields: Sequence[Tensor], device: torch.device) -> None:
        self._shapes = [field.shape for field in fields]
        self._sizes = [-(-field.numel() // ALIGNMENT) * ALIGNMENT for field in fields] + [ALIGNMENT]
        is_int64 = [field.dtype == torch.int64 for field in fields]
        self._int64_fields = sum(is_int64)
        assert is_int64 == sorted(is_int64, reverse=True), "int64 fields come first: one cast serves them all"
        self._pinned = device.type == "cuda"
        self._device = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        self.factor = self._device[-ALIGNMENT:].view(torch.float32)[0]

    def fill(self, fields: Sequence[Tensor], *, factor: float) -> None:
        """Send a micro batch and the factor of its loss. Does not wait for the device."""
        host = torch.empty(self._device.shape, dtype=torch.int32, pin_memory=self._pinned)
        *pieces, last = host.split(self._sizes)
        for piece, field in zip(pieces, fields, strict=True):
            piece[: field.numel()].copy_(field.flatten())
        last.view(torch.float32).fill_(factor)
        self._device.copy_(host, non_blocking=True)

    def inputs(self) -> tuple[Tensor, ...]:
        """The fields as the model takes them. Part of what is captured: each replay casts again."""
        sizes, count = self._sizes[:-1], self._int64_fields
        end_of_int64 = sum(sizes[:count])
        pieces = [
            *self._device[:end_of_int64].long().split(sizes[:count]),
            *self._device[end_of_int64:-ALIGNMENT].split(sizes[count:]),
        ]
        return tuple(piece[: shape.numel()].view(shape) for piece, shape in zip(pieces, self._shapes, strict=True))
