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
    cu_seqlens: torch.Tensor  # int32 [B*D + 1], starts in the flattened B*S, the padding's pieces included; then B*S
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
    target, no trace in loss or gradient. Blank blocks alone have the least width. Takes about 5 us a document."""
    widths = {int(blocks.widths[number]) for number in numbers if number >= 0} or {int(blocks.widths.min())}
    assert len(widths) == 1, "the blocks of a batch have one width"
    [width] = widths
    shape = (len(numbers), width)
    input_ids, labels = np.full(shape, blocks.pad_id, np.int64), np.full(shape, IGNORE, np.int64)
    position_ids, document_ids = np.empty(shape, np.int64), np.empty(shape, np.int32)
    positions = np.arange(width)
    boundaries: list[int] = []
    tokens = 0
    for b, number in enumerate(numbers):
        indices = blocks[number].tolist() if number >= 0 else []
        start = 0
        for place, index in enumerate(indices):
            document = blocks.documents[index]
            end = start + len(document)
            input_ids[b, start:end] = document.input_ids
            labels[b, start : end - 1] = np.where(document.supervised, document.input_ids, IGNORE)[1:]
            position_ids[b, start:end] = positions[: end - start]
            document_ids[b, start:end] = place
            boundaries.append(b * width + start)
            start = end
        position_ids[b, start:] = positions[: width - start]
        document_ids[b, start:] = len(indices)
        boundaries += range(b * width + start, (b + 1) * width, blocks.max_seqlen)
        tokens += start
    cu_seqlens = np.full(len(numbers) * blocks.max_documents + 1, len(numbers) * width, np.int32)
    cu_seqlens[: len(boundaries)] = boundaries
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        document_ids=torch.from_numpy(document_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        tokens=tokens,
        supervised_tokens=int(np.count_nonzero(labels != IGNORE)),
    )
