"""Going on with another number of processes, or another cut of a step into micro batches (run.allow_reshard).

The order of an epoch's blocks does not depend on the ranks (data/loader.py). So where a step has as many blocks as
before (micro_batch * accumulation * processes), every step has the very blocks that it would have had. Otherwise the
run goes on at its next whole step: the blocks before that are left out, and none comes twice.
"""

import random
from typing import Any

import numpy as np
import torch

from launcher.data.loader import StepShape
from launcher.errors import CheckpointError

RESHARD_KEYS = ("train.micro_batch", "train.accumulation", "processes")  # of a run's identity; all others must be equal


def step_shape_of(identity: dict[str, Any]) -> StepShape:
    """How the run of this identity cuts a step."""
    micro_batch, accumulation, processes = (identity[key] for key in RESHARD_KEYS)
    return StepShape(micro_batch, accumulation * processes)


def check_epochs(saved: dict[str, Any], here: dict[str, Any], *, epochs: float | None) -> None:
    """Raise CheckpointError where train.epochs sets the end and a step's blocks change in number: the steps done so far
    and those to come would be parts of different wholes."""
    before, now = step_shape_of(saved).blocks, step_shape_of(here).blocks
    if epochs is not None and before != now:
        raise CheckpointError(
            "with train.epochs a resumed run must keep the blocks of a step (micro_batch x accumulation x processes); "
            f"{before} in the state, {now} here.\nKeep their number, or give train.steps in place of train.epochs."
        )


def reshard_notes(
    saved: dict[str, Any], here: dict[str, Any], *, left_out: int, new_ranks: list[int]
) -> tuple[str, ...]:
    """What changed and what it does to the data and the random numbers; nothing where nothing changed."""
    changed = [f"{key} {here[key]} in place of {saved[key]}" for key in RESHARD_KEYS if here[key] != saved[key]]
    if not changed:
        return ()
    before, now = step_shape_of(saved).blocks, step_shape_of(here).blocks
    data = "each step has the blocks that it would have had"
    if before != now:
        data = f"a step has {now} blocks in place of {before}; blocks left out to begin at a whole step: {left_out}"
    notes = [f"run.allow_reshard: goes on with {', '.join(changed)}; {data}"]
    if new_ranks:
        ranks = ", ".join(map(str, new_ranks))
        notes.append(f"no random state was saved for rank {ranks}: seeded from train.seed, the rank and the step")
    return tuple(notes)


def seed_generators(*numbers: int) -> None:
    """Seed Python's, numpy's and torch's generators, those of CUDA devices too, from these numbers together."""
    python, numpy, torchs = (int(word) for word in np.random.SeedSequence(numbers).generate_state(3))
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(torchs)
