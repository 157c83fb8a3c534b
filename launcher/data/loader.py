"""Packed rows become the micro batches of one rank, in an order that does not depend on how many ranks there are.

With G = B * accumulation * world rows a step, optimizer step s of an epoch takes order[s*G : (s+1)*G], laid out as
[accumulation, world, B]: 1 rank x 8 micro steps, 8 ranks x 1 and 2 ranks x 4 see the same rows in the same step.
The last step of an epoch is filled up with blank rows (padding without labels): every row is seen once, in one shape.

    B micro batch    S positions    D max_documents    -1 in a plan stands for a blank row
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from launcher.data.packing import IGNORE, Packed


@dataclass(frozen=True)
class MicroBatch:
    """B rows of S positions for one forward pass. Shapes are the same for every batch of a run."""

    input_ids: torch.Tensor  # int64 [B, S]
    labels: torch.Tensor  # int64 [B, S], already shifted, IGNORE where there is no loss
    position_ids: torch.Tensor  # int64 [B, S], from 0 in each document
    document_ids: torch.Tensor  # int32 [B, S], from 0 in each row
    cu_seqlens: torch.Tensor  # int32 [B*D + 1], document boundaries over the flattened B*S, its end repeated as filler
    tokens: int  # non-padding
    supervised_tokens: int

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The batch on `device`. For CUDA through pinned memory, so that the host does not wait for the copy."""
        cuda = torch.device(device).type == "cuda"

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.pin_memory() if cuda else tensor).to(device, non_blocking=cuda)

        return replace(
            self,
            input_ids=moved(self.input_ids),
            labels=moved(self.labels),
            position_ids=moved(self.position_ids),
            document_ids=moved(self.document_ids),
            cu_seqlens=moved(self.cu_seqlens),
        )


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: this rank's micro batches, and the counts of all ranks and micro batches together.

    The packing is the same on every rank, so the global counts need no collective.
    """

    micro_batches: tuple[MicroBatch, ...]
    tokens: int
    supervised_tokens: int
    epoch: int  # 0-based


class TrainLoader:
    """Endless optimizer steps over the packed rows, reshuffled every epoch by (seed, epoch)."""

    def __init__(
        self, packed: Packed, *, micro_batch: int, accumulation: int, rank: int, world_size: int, seed: int
    ) -> None:
        self._packed = packed
        self._step_shape = (accumulation, world_size, micro_batch)
        self._rank = rank
        self._seed = seed
        self._supervised = np.count_nonzero(packed.labels != IGNORE, axis=1)
        self.steps_per_epoch = -(-packed.rows // (accumulation * world_size * micro_batch))

    def __iter__(self) -> Iterator[StepBatch]:
        epoch = 0
        while True:
            order = np.random.default_rng((self._seed, epoch)).permutation(self._packed.rows)
            for step in _plan(order, self._step_shape):
                yield self._step(step, epoch)
            epoch += 1

    def _step(self, plan: NDArray[np.int64], epoch: int) -> StepBatch:
        real = plan[plan >= 0]
        return StepBatch(
            micro_batches=tuple(_micro_batch(self._packed, rows) for rows in plan[:, self._rank]),
            tokens=int(self._packed.lengths[real].sum()),
            supervised_tokens=int(self._supervised[real].sum()),
            epoch=epoch,
        )


def eval_batches(packed: Packed, *, micro_batch: int, rank: int, world_size: int) -> list[MicroBatch]:
    """This rank's share of all rows: disjoint, exhaustive over the ranks, and equally many batches on each of them."""
    plan = _plan(np.arange(packed.rows), (world_size, micro_batch))
    return [_micro_batch(packed, rows) for rows in plan[:, rank]]


def _plan(order: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """`order` cut into as many blocks of `shape` as it takes, [blocks, *shape], with -1 behind the last row."""
    filler = -len(order) % int(np.prod(shape))
    return np.concatenate([order, np.full(filler, -1)]).reshape(-1, *shape)


def _micro_batch(packed: Packed, rows: NDArray[np.int64]) -> MicroBatch:
    blank = rows < 0  # row -1 is gathered as the last one, then blanked out
    arrays = {n: getattr(packed, n)[rows] for n in ("input_ids", "labels", "position_ids", "document_ids")}
    arrays["input_ids"][blank] = packed.pad_id
    arrays["labels"][blank] = IGNORE
    arrays["position_ids"][blank] = np.arange(packed.input_ids.shape[1])
    arrays["document_ids"][blank] = 0
    document_ids = arrays.pop("document_ids")
    return MicroBatch(
        **{name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()},
        document_ids=torch.from_numpy(document_ids),
        cu_seqlens=torch.from_numpy(_cu_seqlens(document_ids, len(rows) * packed.max_documents + 1)),
        tokens=int(packed.lengths[rows[~blank]].sum()),
        supervised_tokens=int(np.count_nonzero(arrays["labels"] != IGNORE)),
    )


def _cu_seqlens(document_ids: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    starts = np.ones_like(document_ids, dtype=bool)  # a row's first position always starts a document
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    cu_seqlens = np.full(size, document_ids.size, np.int32)
    found = np.flatnonzero(starts)
    cu_seqlens[: len(found)] = found
    return cu_seqlens
