"""Documents of many lengths share rows of one length, so that every batch has the one shape that was compiled.

    lengths 9 6 5 4 3 3      row 0   a a a a a a a a a e e e
    rows of 12 positions     row 1   b b b b b b c c c c c .
                             row 2   d d d d f f f . . . . .      blocks.py draws the arrays of a row

In two ways, both longest documents first, and the one with fewer rows is taken:
- by sums: a row is begun with the longest document left and completed by those whose sum comes nearest to its room.
  Documents of much the same length need it: in rows of 256 the shipped set fills 99 %, by best fit 95 %;
- by best fit: each document goes into the open row that it leaves the least room in. This looks at all rows at once,
  which is better where a row holds only two or three.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import chain

import numpy as np

from launcher.data.documents import Documents, Longs
from launcher.data.pack.blocks import Blocks

CANDIDATES = 32  # lengths, out of those left, whose sums are looked at; more give no fuller rows


def pack(
    documents: Documents, indices: Longs, *, max_length: int, pad_id: int, seed: int, most: int | None = None
) -> Blocks:
    """Rows of `max_length` positions from the documents `indices`, which may name one twice; none is split.

    `indices` is not empty, and each document has 1 to `max_length` tokens. The seed decides which of equally long ones
    meet. `most`: a row that holds so many documents is closed, for whoever must bound them before seeing all.
    """
    shuffled = np.random.default_rng(seed).permutation(indices)
    found = documents.lengths[shuffled]
    longest_first = np.argsort(-found, kind="stable")
    lengths = found[longest_first].tolist()
    assert lengths[0] <= max_length, "documents are cut to max_length before they are packed"
    ways = (way(lengths, capacity=max_length, most=most or len(lengths)) for way in (_by_sums, _by_best_fit))
    rows = min(ways, key=len)
    placed = np.fromiter(chain.from_iterable(rows), np.int64, len(lengths))
    row_documents = np.empty_like(shuffled)
    row_documents[np.argsort(-placed, kind="stable")] = shuffled[longest_first]
    return Blocks.of(
        documents,
        row_documents,
        row_sizes=np.array([len(row) for row in rows]),
        widths=np.full(len(rows), max_length, np.int32),
        pad_id=pad_id,
    )


def _by_sums(lengths: Sequence[int], *, capacity: int, most: int) -> list[list[int]]:
    """The lengths of each row; `lengths` are given longest first.

    `sums` has bit s set while some of the candidates add up to s: k more of length v add those bits shifted by k v. A
    candidate that fills the room ends the search, and the way back through the steps says which were used.
    """
    rows: list[list[int]] = []
    left = np.bincount(lengths).tolist()  # how many of each length
    values = [value for value, count in enumerate(left) if count]  # ascending
    while values:
        row, room = [values[-1]], capacity - values[-1]
        _take(values[-1], left, values)
        fitting = values[: bisect_right(values, room)]
        steps, sums, below = [], 1, (2 << room) - 1
        for value in fitting[:: -max(1, -(-len(fitting) // CANDIDATES))]:  # the longest first
            steps.append((value, sums))
            copies, some = min(left[value], room // value), 1
            while copies:  # 1, 2, 4, ... of them and the rest add up to any number: 300 are 9 shifts
                some = min(some, copies)
                sums |= (sums << some * value) & below
                copies, some = copies - some, 2 * some
            if sums >> room:
                break
        wanted = sums.bit_length() - 1
        for value, before in reversed(steps):
            while not (before >> wanted) & 1 and len(row) < most:
                wanted -= value
                row.append(value)
                _take(value, left, values)
        rows.append(row)
    return rows


def _take(value: int, left: list[int], values: list[int]) -> None:
    left[value] -= 1
    if not left[value]:
        del values[bisect_left(values, value)]


def _by_best_fit(lengths: Sequence[int], *, capacity: int, most: int) -> list[list[int]]:
    """The lengths of each row; `lengths` are given longest first.

    The open rows are kept by their free room, and `free` has bit r set while a row with room r is open: the best fit is
    the lowest bit from `length` up. An item costs one shift of `capacity` bits (32 words at 2048), beside the sort.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    free = 0
    for length in lengths:
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                free ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(length)
        if (left := room - length) and len(rows[row]) < most:
            by_room[left].append(row)
            free |= 1 << left
    return rows
