"""Blocks: which documents lie in which packed sequence. micro_batch.py makes the arrays of a training step of them.

documents       a (5 tokens)   b (4)   c (12)
block 0         a a a a a b b b b . . .           block_documents   a b | c
block 1         c c c c c c c c c c c c           block_offsets     0     2   3

N  blocks       .  padding, which attention sees as documents too: pseudo-documents
"""

from dataclasses import dataclass, replace

import numpy as np

from launcher.data.documents import Documents, Ints, Longs


@dataclass(frozen=True)
class Blocks:
    """N blocks. Block b has `widths[b]` positions and holds the documents that `blocks[b]` gives, in order.

    A document may lie in several blocks: a source whose weight repeats it. `max_seqlen`: upper bound on document
    length, passed to attention. Padding is split into pseudo-documents of at most this length. `max_documents`: most
    documents of a block, pseudo-documents included; every batch has room for as many boundaries.
    """

    documents: Documents
    block_offsets: Longs  # [N + 1], into block_documents
    block_documents: Longs  # [placements], into documents
    widths: Ints  # [N]
    pad_id: int
    max_documents: int
    max_seqlen: int

    @classmethod
    def of(
        cls, documents: Documents, block_documents: Longs, *, block_sizes: Longs, widths: Ints, pad_id: int
    ) -> "Blocks":
        """Block b takes the next `block_sizes[b]` of `block_documents`, each at most as long as the widest block."""
        offsets = np.concatenate([[0], np.cumsum(block_sizes, dtype=np.int64)])
        return cls(documents, offsets, block_documents, widths, pad_id, 0, 0).bounded(int(widths.max()))

    def bounded(self, max_seqlen: int) -> "Blocks":
        """The same blocks with this upper bound on document length, and max_documents to match. A blank block never
        needs more: its pseudo-documents are as long as the bound."""
        assert max_seqlen >= self.longest_document, f"{self.longest_document} tokens, at most {max_seqlen} said"
        pseudo_documents = -(-(self.widths - self.lengths) // max_seqlen)
        max_documents = int((np.diff(self.block_offsets) + pseudo_documents).max())
        return replace(self, max_seqlen=max_seqlen, max_documents=max_documents)

    def __len__(self) -> int:
        return len(self.widths)

    def __getitem__(self, block: int) -> Longs:
        """The documents of a block, by their index in `documents`."""
        return self.block_documents[self.block_offsets[block] : self.block_offsets[block + 1]]

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document that lies in a block."""
        return int(self.documents.lengths[self.block_documents].max())

    @property
    def shapes(self) -> tuple[int, ...]:
        """The different widths, ascending: each is a planned shape."""
        return tuple(np.unique(self.widths).tolist())

    @property
    def lengths(self) -> Longs:
        """Tokens of each block, [N]."""
        return self._sums(self.documents.lengths)

    @property
    def targets(self) -> Longs:
        """Supervised tokens of each block, [N]."""
        return self._sums(self.documents.targets)

    def max_targets(self, count: int) -> dict[int, int]:
        """By width: the supervised tokens of the `count` blocks that have the most. No micro batch of so many blocks
        has more, in any order and on any rank: none holds a block twice."""
        targets = self.targets
        return {width: int(np.sort(targets[self.widths == width])[-count:].sum()) for width in self.shapes}

    @property
    def single_documents(self) -> bool:
        """Whether no block holds more than one document."""
        return bool((np.diff(self.block_offsets) <= 1).all())

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def supervised_tokens(self) -> int:
        return int(self.targets.sum())

    @property
    def fill(self) -> float:
        """Share (0-1) of the positions that hold a token."""
        return self.tokens / int(self.widths.sum(dtype=np.int64))

    def _sums(self, of_documents: Longs) -> Longs:
        """[D] -> [N]: the sum over the documents of each block."""
        sums = np.concatenate([[0], np.cumsum(of_documents[self.block_documents])])
        return np.diff(sums[self.block_offsets])


def blank_step_note(blocks: int, step_blocks: int) -> tuple[str, ...]:
    """A note when a step is larger than an epoch of this many blocks: the rest of it is blank."""
    if blocks >= step_blocks:
        return ()
    return (
        f"a step holds {step_blocks} blocks and the data only {blocks}: lower train.micro_batch or train.accumulation",
    )
