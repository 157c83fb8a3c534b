"""A micro batch: blocks of one width as the tensors of one forward pass.

One block of S = 12 positions: the documents a (5 tokens, its answer a3 a4), b (4 tokens, its answer b2 b3), padding:

    position        0   1   2   3   4   5   6   7   8   9  10  11
    input_ids      a0  a1  a2  a3  a4  b0  b1  b2  b3   P   P   P
    labels          .   .  a3  a4   .   .  b2  b3   .   .   .   .
    position_ids    0   1   2   3   4   0   1   2   3   0   1   2
    document_ids    0   0   0   0   0   1   1   1   1   2   2   2
    cu_seqlens    0 5 9 12 12      with D = 4; where max_seqlen is 2, the padding is two pieces: 0 5 9 11 12

    a3  token 3 of document a      .  IGNORE: no loss at this position      P  pad_id

Labels are shifted already: labels[t] is the token that position t must predict. So the last token of a document
predicts nothing, its first token is never a target, and attention within document_ids never sees a neighbour.

    B  blocks of the micro batch    S  positions, the width    D  Blocks.max_documents
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from launcher.data.documents import Longs
from launcher.data.pack.blocks import Blocks

IGNORE = -100  # the label of a position without a target; torch's own cross-entropy ignores it by default


@dataclass(frozen=True)
class MicroBatch:
    """B blocks of S positions for one forward pass. S is one of the run's planned widths; B and D never change."""

    input_ids: torch.Tensor  # int64 [B, S]
    labels: torch.Tensor  # int64 [B, S], already shifted, IGNORE where there is no loss
    position_ids: torch.Tensor  # int64 [B, S], from 0 in each document
    document_ids: torch.Tensor  # int32 [B, S], from 0 in each block
    cu_seqlens: (
        torch.Tensor
    )  # int32 [B*D + 1], over the flattened B*S; padding in pieces of max_seqlen; filled with B*S
    tokens: int  # non-padding
    supervised_tokens: int

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The batch on `device`. For CUDA through pinned memory, so that the host does not wait for the copy."""
        cuda = torch.device(device).type == "cuda"
        moved: dict[str, Any] = {
            name: (value.pin_memory() if cuda else value).to(device, non_blocking=cuda)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def micro_batch_of(blocks: Blocks, numbers: Sequence[int] | Longs) -> MicroBatch:
    """The blocks of these numbers, all of one width. -1 stands for a blank block, which is all padding: no token, no
    target, no trace in loss or gradient. Blank blocks alone have the least width."""
    numbers = np.asarray(numbers, dtype=np.int64)
    real = numbers[numbers >= 0]
    width = int(blocks.widths[real[0]] if len(real) else blocks.widths.min())
    assert (blocks.widths[real] == width).all(), "the blocks of a batch have one width"
    counts = np.where(numbers < 0, 0, blocks.block_offsets[numbers + 1] - blocks.block_offsets[numbers])
    # For each document of these blocks:
    documents = blocks.block_documents[_ranges(blocks.block_offsets[numbers], counts)]
    sizes = blocks.documents.offsets[documents + 1] - blocks.documents.offsets[documents]
    block = np.repeat(np.arange(len(numbers)), counts)
    lengths = np.bincount(block, weights=sizes, minlength=len(numbers)).astype(np.int64)
    starts = block * width + np.cumsum(sizes) - sizes - (np.cumsum(lengths) - lengths)[block]
    # For each of their tokens:
    position = _ranges(np.zeros_like(sizes), sizes)
    place = np.repeat(starts, sizes) + position  # in the flattened [B, S]
    source = np.repeat(blocks.documents.offsets[documents], sizes) + position
    tokens = blocks.documents.input_ids[source]
    targets = np.where(blocks.documents.supervised[source], tokens, IGNORE)
    predicted = position > 0

    shape = (len(numbers), width)
    labels = _scattered(np.full(shape, IGNORE), place[predicted] - 1, targets[predicted], np.int64)
    padding_position = np.broadcast_to(np.arange(width) - lengths[:, None], shape)
    document_in_block = np.repeat(_ranges(np.zeros_like(counts), counts), sizes)
    return MicroBatch(
        input_ids=_scattered(np.full(shape, blocks.pad_id), place, tokens, np.int64),
        labels=labels,
        position_ids=_scattered(padding_position, place, position, np.int64),
        document_ids=_scattered(np.broadcast_to(counts[:, None], shape), place, document_in_block, np.int32),
        cu_seqlens=_cu_seqlens(blocks, starts, lengths, width=width),
        tokens=int(lengths.sum()),
        supervised_tokens=int((labels != IGNORE).sum()),
    )


def _cu_seqlens(blocks: Blocks, starts: Longs, lengths: Longs, *, width: int) -> torch.Tensor:
    """The starts of documents and pseudo-documents, sorted, then B*S as filler: int32 [B*D + 1]."""
    count = len(lengths)
    pieces = -(-(width - lengths) // blocks.max_seqlen)  # pseudo-documents of each block
    padding_starts = np.repeat(np.arange(count) * width + lengths, pieces)
    padding_starts += blocks.max_seqlen * _ranges(np.zeros_like(pieces), pieces)
    boundaries = np.sort(np.concatenate([starts, padding_starts]))
    cu_seqlens = np.full(count * blocks.max_documents + 1, count * width, np.int32)
    cu_seqlens[: len(boundaries)] = boundaries
    return torch.from_numpy(cu_seqlens)


def _ranges(starts: Longs, sizes: Longs) -> Longs:
    """starts[i], starts[i] + 1, ..., sizes[i] numbers of each, one after another."""
    ends = np.cumsum(sizes)
    return np.repeat(starts - ends + sizes, sizes) + np.arange(ends[-1] if len(ends) else 0)


def _scattered(background: NDArray[Any], places: Longs, values: NDArray[Any], dtype: type) -> torch.Tensor:
    """A copy of `background` with `values` at `places`, which count over the flattened array."""
    array: NDArray[Any] = background.astype(dtype)
    array.reshape(-1)[places] = values
    return torch.from_numpy(array)
