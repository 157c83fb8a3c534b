"""Documents laid out in blocks as `data.batching` says. Packed ones share blocks (packing.py); here each document gets
a block of its own, of one width (padded) or of the least of a few (bucketed). Each width is compiled once.

Widths 8 and 16 for documents a to c of 5, 7 and 13 tokens:     block 0   a a a a a . . .
                                                                block 1   b b b b b b b .
                                                                block 2   c c c c c c c c c c c c c . . .
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from launcher.data.documents import Documents, Longs
from launcher.data.pack.blocks import Blocks
from launcher.data.pack.packing import pack
from launcher.recipe.data_section import DataSection

MAX_WIDTHS = 6  # each costs two compiled graphs
MULTIPLE = 8  # tensor cores take half-precision matrices in steps of 8
MAX_WIDTHS_TRIED = 512  # widths considered; for longer documents they lie further apart
ATTENTION_TILE = 128  # positions: a bound on document length between two multiples saves nothing
MIN_POSITIONS_SAVED = 0.02  # of the positions: more widths must save at least this share


def lay_out(
    documents: Documents, train: Longs, validation: Longs, *, data: DataSection, pad_id: int, seed: int
) -> tuple[Blocks, Blocks | None]:
    """The blocks of the documents `train` and `validation`, which may name one twice; None when `validation` is empty.

    Each document has 1 to data.max_length tokens. Bucketed widths are chosen over both sets, and both have the same
    max_documents and max_seqlen: a second size of the boundaries would be a second graph.
    """
    parts = [part for part in (train, validation) if len(part)]
    if data.batching == "packed":
        layouts = [pack(documents, part, max_length=data.max_length, pad_id=pad_id, seed=seed) for part in parts]
    else:
        widths: tuple[int, ...] = (data.max_length,)
        if data.batching == "bucketed":
            widths = choose_widths(documents.lengths[np.concatenate(parts)], max_length=data.max_length)
        layouts = [bucket(documents, part, widths=widths, pad_id=pad_id) for part in parts]
    # Variable-length attention launches as many tiles for every document as the longest may fill.
    longest = max(blocks.longest_document for blocks in layouts)
    max_seqlen = min(-(-longest // ATTENTION_TILE) * ATTENTION_TILE, max(max(blocks.shapes) for blocks in layouts))
    layouts = [blocks.bounded(max_seqlen) for blocks in layouts]
    max_documents = max(blocks.max_documents for blocks in layouts)
    layouts = [replace(blocks, max_documents=max_documents) for blocks in layouts]
    return layouts[0], layouts[1] if len(layouts) > 1 else None


def choose_widths(lengths: Longs, *, max_length: int) -> tuple[int, ...]:
    """At most 6 block widths, ascending, for documents of these `lengths` (1 to max_length tokens each, at least one).

    The padding is the least possible with so many widths, all multiples of 8 except a `max_length` that is none; the
    largest holds the longest document. Fewer widths are chosen where six would save less than 2 % of the positions.
    """
    step = MULTIPLE * -(-int(lengths.max()) // (MULTIPLE * MAX_WIDTHS_TRIED))
    rounded = np.minimum(-(-lengths // step) * step, max_length)
    plans = _least_positions(*np.unique(rounded, return_counts=True))
    least = plans[-1][0]
    return next(widths for positions, widths in plans if positions * (1 - MIN_POSITIONS_SAVED) <= least)


def bucket(documents: Documents, indices: Longs, *, widths: Sequence[int], pad_id: int) -> Blocks:
    """A block for each of `indices` (at least one), in order, of the least of `widths` (ascending) that holds it."""
    lengths = documents.lengths[indices]
    assert lengths.max() <= widths[-1], "widths are chosen over all documents"
    fitting = np.array(widths, np.int32)[np.searchsorted(widths, lengths)]
    return Blocks.of(documents, indices, block_sizes=np.ones_like(indices), widths=fitting, pad_id=pad_id)


def _least_positions(candidates: Longs, counts: NDArray[np.integer]) -> list[tuple[float, tuple[int, ...]]]:
    """(positions, chosen widths) with the least padding for one width, two, and so on up to six.

    counts[i] documents need candidates[i] (ascending). Dynamic programming: the lengths up to j are covered best by k
    widths when the last covers those from some i on, and k - 1 cover the lengths before i best.
    """
    documents = np.concatenate([[0], np.cumsum(counts)])
    # [i, j]: positions of the documents of lengths i to j in blocks of candidates[j]
    cost = np.where(np.tri(len(candidates), k=-1), np.inf, candidates * (documents[1:] - documents[:-1, None]))
    best, begins = cost[0], []
    plans: list[tuple[float, tuple[int, ...]]] = [(float(best[-1]), (int(candidates[-1]),))]
    while len(plans) < min(MAX_WIDTHS, len(candidates)):
        total = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        best = total.min(axis=0)
        begins.append(total.argmin(axis=0))  # the i of each j
        end, chosen = len(candidates) - 1, [int(candidates[-1])]
        for begin in reversed(begins):
            end = int(begin[end]) - 1
            chosen.append(int(candidates[end]))
        plans.append((float(best[-1]), tuple(reversed(chosen))))
    return plans
