"""Which rows validate, and how often an epoch repeats each row of a weighted source."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from launcher.data.documents import Bools, Longs
from launcher.data.read.rows import Conversation, Message, Row, TokenIds

_quoted = json.JSONEncoder().encode  # of a string; json.dumps of the lists takes twice as long


def digest(row: Row, *, seed: int) -> bytes:
    """16 bytes that depend on the row's content and the seed only, not on its place.

    Whitespace around a message or a text makes no difference, nor do Windows line ends, nor where the completion begins
    in a text: it is tokenised as one; nor ids of tool calls, nor which turns or token ids are learned.
    """
    if isinstance(row, TokenIds):
        content = " ".join(map(str, row.input_ids.tolist()))
    elif isinstance(row, Conversation):
        content = f"[{', '.join([f'[{_quoted(m.role)}, {_quoted(_normal(m.content))}]' for m in row.messages])}]"
        if row.has_extra:
            content += json.dumps([row.tools, *map(_learned, row.messages)], sort_keys=True)
    else:
        content = _quoted(_normal(row.text))
    return hashlib.blake2b(content.encode(), digest_size=16, salt=seed.to_bytes(8, "little")).digest()


def _learned(message: Message) -> list[Any]:
    """What the model reads or writes of a message beside its content: no ids, which are drawn."""
    return [[call["function"] for call in message.calls], _normal(message.reasoning), message.extra.get("name")]


def _normal(text: str) -> str:
    return text.strip().replace("\r\n", "\n")


def held_out(digests: Sequence[bytes], *, fraction: float) -> Bools:
    """True for the rows that validate. Equal rows are on the same side, which does not depend on the file's order.

    With fraction > 0 and two different rows, at least one row validates. Validation has at most round(fraction * rows)
    rows, unless every group of equal rows is larger than that: then it is the smallest group.
    """
    chosen = np.zeros(len(digests), np.bool_)
    groups: dict[bytes, list[int]] = {}
    for row, row_digest in enumerate(digests):
        groups.setdefault(row_digest, []).append(row)
    if fraction == 0 or len(groups) < 2:
        return chosen
    room = min(round(fraction * len(digests)), len(digests) - 1)
    by_digest = [groups[row_digest] for row_digest in sorted(groups)]
    for rows in by_digest:
        if len(rows) <= room:
            chosen[rows] = True
            room -= len(rows)
    if not chosen.any():
        chosen[min(by_digest, key=len)] = True
    return chosen


def weighted(sources: Sequence[Longs], weights: Sequence[float], *, seed: int) -> tuple[Longs, int, int]:
    """The rows of one epoch, where source i gives the share weights[i] / sum(weights) of them.

    An epoch is as long as all the sources together. A source with too few rows for its share is repeated, whole passes
    first; of one with too many a seeded choice is taken. -> (rows, how many are repetitions, how many are left out).
    """
    epoch_rows, total_weight = sum(len(rows) for rows in sources), sum(weights)
    random = np.random.default_rng(seed)
    chosen, repeated, left_out = [], 0, 0
    for rows, weight in zip(sources, weights, strict=True):
        if not len(rows):
            continue
        share = max(1, round(epoch_rows * weight / total_weight))
        passes, rest = divmod(share, len(rows))
        chosen += [np.tile(rows, passes), np.sort(random.permutation(rows)[:rest])]
        repeated += max(0, share - len(rows))
        left_out += max(0, len(rows) - share)
    return np.concatenate(chosen), repeated, left_out
