"""Copies hundreds of tensors from a CUDA device to the host in a few transfers.

The state of a 1B model is 900 small tensors. A transfer of each costs the host 20 ms, in which the device waits. So the
tensors of one dtype are joined on the device, some MiB at a time, and each piece is one transfer into pinned memory.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PIECE_BYTES = 32 * 2**20  # device memory that a copy takes for a moment


class HostCopies:
    """Copies of always the same tensors, into pinned memory that is made once: making it takes longer than a copy."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._pieces: list[tuple[list[Tensor], Tensor]] = []  # flat tensors, and where they go, joined

    def begin(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Enqueue the copies of `tensors`, all on one CUDA device, on its current stream; returns them on the host.

        Read them once the device has come so far. The next `begin` writes the same memory.
        """
        same = len(tensors) == len(self._tensors) and all(a is b for a, b in zip(tensors, self._tensors, strict=True))
        if not same:
            self._lay_out(tensors)
        for parts, host in self._pieces:
            # The allocator gives the memory of a piece to the next one, whose work stands behind this transfer.
            host.copy_(torch.cat(parts) if len(parts) > 1 else parts[0], non_blocking=True)
        return self._copies

    def _lay_out(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._pieces, copies = list(tensors), [], dict[int, Tensor]()
        for dtype in {tensor.dtype for tensor in tensors}:
            numbers = [number for number, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = [tensors[number].detach().reshape(-1) for number in numbers]
            host = torch.empty(sum(part.numel() for part in flat), dtype=dtype, pin_memory=True)
            for number, part in zip(numbers, host.split([part.numel() for part in flat]), strict=True):
                copies[number] = part.view(tensors[number].shape)
            groups = list(_groups(flat))
            sizes = [sum(part.numel() for part in group) for group in groups]
            self._pieces += zip(groups, host.split(sizes), strict=True)
        self._copies = [copies[number] for number in range(len(tensors))]


def _groups(flat: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, at most PIECE_BYTES in a group; a larger one alone."""
    group, size = list[Tensor](), 0
    for part in flat:
        if group and size + part.nbytes > PIECE_BYTES:
            yield group
            group, size = [], 0
        group.append(part)
        size += part.nbytes
    if group:
        yield group
