"""How a micro batch reaches the device: in one copy, to where the last one of its shape was.

    host     [ input_ids | labels | position_ids | document_ids | cu_seqlens | factor ]    int32, pinned, made anew
    device   the same                                                                      int32, static

A captured graph reads fixed addresses, and a copy costs the host more in its launch than in its bytes: hence one buffer
for all fields. Token ids, labels and positions are int64 to the model and int32 on the way: cast on the device.
Each field begins at a multiple of 16 bytes. The host buffer is left to the caching host allocator, which gives its
memory out again only once the copy is over.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 4  # int32 values in 16 bytes


class Staging:
    """Static tensors of one shape, made after `fields`: the tensors of a micro batch, int64 before int32."""

    def __init__(self, fields: Sequence[Tensor], device: torch.device) -> None:
        self._shapes = [tuple(field.shape) for field in fields]
        self._sizes = [-(-field.numel() // ALIGNMENT) * ALIGNMENT for field in fields] + [ALIGNMENT]
        wide = [field.dtype == torch.int64 for field in fields]
        self._wide = sum(wide)
        assert wide == sorted(wide, reverse=True), "int64 fields come first: one cast serves them all"
        self._pinned = device.type == "cuda"
        self._device = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        self.factor = self._device[-ALIGNMENT:].view(torch.float32)[0]

    def fill(self, fields: Sequence[Tensor], *, factor: float) -> None:
        """Send a micro batch, and the factor of its loss. Does not wait for the device."""
        host = torch.empty(self._device.shape, dtype=torch.int32, pin_memory=self._pinned)
        *pieces, last = host.split(self._sizes)
        for piece, field in zip(pieces, fields, strict=True):
            piece[: field.numel()].copy_(field.flatten())
        last.view(torch.float32).fill_(factor)
        self._device.copy_(host, non_blocking=True)

    def inputs(self) -> tuple[Tensor, ...]:
        """The fields as the model takes them. Part of what is captured: the cast happens at each replay."""
        sizes, wide = self._sizes[:-1], sum(self._sizes[: self._wide])
        pieces = [
            *self._device[:wide].long().split(sizes[: self._wide]),
            *self._device[wide:-ALIGNMENT].split(sizes[self._wide :]),
        ]
        return tuple(piece[: _numel(s)].view(s) for piece, s in zip(pieces, self._shapes, strict=True))


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
