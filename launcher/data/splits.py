"""Which rows validate, and how often each row of a weighted source is seen in an epoch."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from launcher.data.documents import Bools, Longs
from launcher.data.read.rows import Conversation, Row

_quoted = json.JSONEncoder().encode  # of a string; json.dumps of the lists takes twice as long


def digest(row: Row, *, seed: int) -> bytes:
    """16 bytes, equal for equal rows under the same seed, wherever they stand."""
    if isinstance(row, Conversation):
        content = f"[{', '.join([f'[{_quoted(m.role)}, {_quoted(m.content)}]' for m in row.messages])}]"
    else:
        content = _quoted(row.text)
    return hashlib.blake2b(content.encode(), digest_size=16, salt=seed.to_bytes(8, "little")).digest()


def held_out(digests: Sequence[bytes], *, fraction: float) -> Bools:
    """True for the rows that validate. Equal rows go to the same side, which does not depend on the file's order.

    At least one row validates if two differ and fraction > 0; validation grows to round(fraction * rows), rarely beyond
    (when every group of equal rows is larger than that).
    """
    chosen = np.zeros(len(digests), np.bool_)
    groups: dict[bytes, list[int]] = {}
    for index, found in enumerate(digests):
        groups.setdefault(found, []).append(index)
    if fraction == 0 or len(groups) < 2:
        return chosen
    wanted, taken = min(round(fraction * len(digests)), len(digests) - 1), 0
    in_order = sorted(groups)
    for found in in_order:
        if taken + len(groups[found]) <= wanted:
            chosen[groups[found]] = True
            taken += len(groups[found])
    if not taken:
        chosen[groups[min(in_order, key=lambda found: len(groups[found]))]] = True
    return chosen


def weighted(sources: Sequence[Longs], weights: Sequence[float], *, seed: int) -> tuple[Longs, int, int]:
    """The rows of one epoch, where source i gives the share weights[i] / sum(weights) of them.

    An epoch is as long as all the sources together. A source with too few rows for its share is repeated, whole passes
    first; of one with too many a seeded choice is taken. -> (rows, how many are repetitions, how many are left out).
    """
    total, whole = sum(len(rows) for rows in sources), sum(weights)
    random = np.random.default_rng(seed)
    chosen, repeated, left_out = [], 0, 0
    for rows, weight in zip(sources, weights, strict=True):
        if not len(rows):
            continue
        wanted = max(1, round(total * weight / whole))
        passes, rest = divmod(wanted, len(rows))
        chosen += [np.tile(rows, passes), np.sort(random.permutation(rows)[:rest])]
        repeated += max(0, wanted - len(rows))
        left_out += max(0, len(rows) - wanted)
    return np.concatenate(chosen), repeated, left_out
