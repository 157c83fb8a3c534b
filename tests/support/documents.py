"""Documents of chosen lengths."""

from collections.abc import Sequence

import numpy as np

from launcher.data.documents import Bools, Documents, Longs


def documents_of(lengths: Sequence[int] | Longs, *, supervised: Bools | None = None) -> Documents:
    """Documents of these lengths, whose tokens are 1, 2, 3, ... throughout; all of them are targets by default."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    ids = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    return Documents(ids, np.ones(len(ids), np.bool_) if supervised is None else supervised, offsets)
