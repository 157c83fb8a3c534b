"""Documents of many lengths share blocks of one width, so that every batch has the one shape that was compiled.

    lengths 9 6 5 4 3 3        block 0   a a a a a a a a a e e e
    blocks of 12 positions     block 1   b b b b b b c c c c c .
                               block 2   d d d d f f f . . . . .      micro_batch.py draws the arrays of a block

There are two ways, both of which take the longest documents first, and the one with fewer blocks is taken:
- by sums: a block begins with the longest document left, and is completed by those whose sum comes nearest to its room.
  Documents of much the same length need it: in blocks of 256 the shipped set fills 99 %, by best fit 95 %;
- by best fit: each document goes into the open block that it leaves the least room in. This looks at all blocks at
  once, which is better where a block holds only two or three.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import chain

import numpy as np

from launcher.data.documents import Documents, Longs
from launcher.data.pack.blocks import Blocks

MAX_LENGTHS = 32  # different lengths whose sums are considered for one block; more give no fuller blocks


def pack(
    documents: Documents, indices: Longs, *, max_length: int, pad_id: int, seed: int, limit: int | None = None
) -> Blocks:
    """Blocks of `max_length` positions from the documents `indices`, which may name one twice; none is split.

    `indices` is not empty, and each document has 1 to `max_length` tokens. The seed decides which of equally long ones
    meet. `limit`: most documents of a block, for a stream, which must know it before it has read all of them.
    """
    shuffled = np.random.default_rng(seed).permutation(indices)
    longest_first = shuffled[np.argsort(-documents.lengths[shuffled], kind="stable")]
    lengths = documents.lengths[longest_first].tolist()
    assert lengths[0] <= max_length, "documents are cut to max_length before they are packed"
    ways = (way(lengths, capacity=max_length, limit=limit or len(lengths)) for way in (_by_sums, _by_best_fit))
    blocks = min(ways, key=len)
    # The ways place lengths, not documents: the n-th longest placed length is the n-th longest document.
    placed = np.fromiter(chain.from_iterable(blocks), np.int64, len(lengths))
    block_documents = np.empty_like(shuffled)
    block_documents[np.argsort(-placed, kind="stable")] = longest_first
    return Blocks.of(
        documents,
        block_documents,
        block_sizes=np.array([len(block) for block in blocks]),
        widths=np.full(len(blocks), max_length, np.int32),
        pad_id=pad_id,
    )


def _by_sums(lengths: Sequence[int], *, capacity: int, limit: int) -> list[list[int]]:
    """The lengths in each block, at most `limit`; `lengths` are given longest first.

    `sums` has bit s set while some of the candidates add up to s: k more of length v add those bits shifted by k v. A
    candidate that fills the room ends the search, and the way back through the steps says which were used.
    """
    blocks: list[list[int]] = []
    left = np.bincount(lengths).tolist()  # how many of each length
    values = [value for value, count in enumerate(left) if count]  # ascending
    while values:
        block, room = [values[-1]], capacity - values[-1]
        _take(values[-1], left, values)
        fitting = values[: bisect_right(values, room)]
        steps, sums, below = [], 1, (2 << room) - 1
        for value in fitting[:: -max(1, -(-len(fitting) // MAX_LENGTHS))]:  # the longest first
            steps.append((value, sums))
            copies, some = min(left[value], room // value), 1
            while copies:  # 1, 2, 4, ... of them and the rest add up to any number: 300 are 9 shifts
                some = min(some, copies)
                sums |= (sums << some * value) & below
                copies, some = copies - some, 2 * some
            if sums >> room:
                break
        remaining = sums.bit_length() - 1
        for value, before in reversed(steps):
            while not (before >> remaining) & 1 and len(block) < limit:
                remaining -= value
                block.append(value)
                _take(value, left, values)
        blocks.append(block)
    return blocks


def _take(value: int, left: list[int], values: list[int]) -> None:
    left[value] -= 1
    if not left[value]:
        del values[bisect_left(values, value)]


def _by_best_fit(lengths: Sequence[int], *, capacity: int, limit: int) -> list[list[int]]:
    """The lengths in each block, at most `limit`; `lengths` are given longest first.

    The open blocks are kept by their free room, and `free` has bit r set while a block with room r is open: the best
    fit is the lowest bit from `length` up. A document costs one shift of `capacity` bits (32 words at 2048).
    """
    blocks: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    free = 0
    for length in lengths:
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            block = by_room[room].pop()
            if not by_room[room]:
                free ^= 1 << room
        else:
            room, block = capacity, len(blocks)
            blocks.append([])
        blocks[block].append(length)
        if (left := room - length) and len(blocks[block]) < limit:
            by_room[left].append(block)
            free |= 1 << left
    return blocks
