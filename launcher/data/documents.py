"""Tokenised rows, one after another in flat arrays: small, and quick to read from disk.

document          0           1       2
input_ids    a0 a1 a2 a3 | b0 b1 | c0 c1 c2      int32 [T]
supervised    .  .  x  x |  .  x |  x  x  x      bool [T]: the token is a target of the loss
offsets       0             4       6        9   int64 [D + 1]

T tokens    D documents
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Document:
    """The tokens of one conversation or text, and for each of them whether it is a target of the loss.

    `remarks`: names of the counts that it adds to. `ends`: those of its answers, by what ends each. `cut_from`: the
    tokens of the row, if this is a part of it.
    """

    input_ids: Ints
    supervised: Bools
    remarks: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    cut_from: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> Longs:
        """As of Documents, int64 [1]."""
        return np.array([len(self)])


@dataclass(frozen=True)
class Documents:
    """D documents in flat arrays, as the module draws them. None is empty. The arrays may be read-only."""

    input_ids: Ints
    supervised: Bools
    offsets: Longs

    @classmethod
    def of(cls, parts: Iterable["Document | Documents"]) -> "Documents":
        """All documents of the parts, in order."""
        listed = list(parts)
        return cls(
            np.concatenate([np.zeros(0, np.int32), *(part.input_ids for part in listed)], dtype=np.int32),
            np.concatenate([np.zeros(0, np.bool_), *(part.supervised for part in listed)], dtype=np.bool_),
            np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in listed)]).cumsum(),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Document:
        start, end = self.offsets[index], self.offsets[index + 1]
        return Document(self.input_ids[start:end], self.supervised[start:end])

    @property
    def lengths(self) -> Longs:
        """Tokens of each document, int64 [D]."""
        return np.diff(self.offsets)

    @property
    def targets(self) -> Longs:
        """Supervised tokens of each document, int64 [D]. Its first token never counts: nothing predicts it."""
        starts = self.offsets[:-1]
        # No cumulative sum: its 8 bytes a token would be more than the documents themselves.
        return np.add.reduceat(self.supervised, starts, dtype=np.int64) - self.supervised[starts]
