"""A loader goes on from its state as if it had never stopped, and does none of the work before."""

import json
from itertools import islice

import numpy as np
import pytest

from launcher.data.documents import Documents
from launcher.data.loader import LoaderState, StepBatch, TrainLoader
from launcher.data.pack.blocks import Blocks
from launcher.data.pack.buckets import lay_out
from launcher.errors import CheckpointError
from launcher.recipe.data_section import DataSection


def blocks_of(batching: str) -> Blocks:
    """21 rows (packed: 11) of documents whose tokens are all different."""
    lengths = np.array([8] * 11 + [16] * 7 + [21] * 3)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    documents, indices = Documents(tokens, np.ones(len(tokens), np.bool_), offsets), np.arange(len(lengths))
    data = DataSection.model_validate({"batching": batching, "max_length": 32})
    return lay_out(documents, indices, indices[:0], data=data, pad_id=0, seed=0)[0]


@pytest.fixture
def packed() -> Blocks:
    return blocks_of("packed")


def loader(
    blocks: Blocks, *, world: int = 1, rank: int = 0, accumulation: int = 4, micro_batch: int = 1
) -> TrainLoader:
    return TrainLoader(blocks, micro_batch=micro_batch, accumulation=accumulation, rank=rank, world_size=world, seed=0)


def shown(step: StepBatch) -> list[object]:
    return [[batch.input_ids.tolist() for batch in step.micro_batches], step.tokens, step.supervised_tokens, step.epoch]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("batching", ["packed", "bucketed", "padded"])
def test_a_state_restores_the_exact_next_step_from_anywhere(batching: str, world: int, accumulation: int) -> None:
    blocks = blocks_of(batching)
    for rank in range(world):

        def make(rank: int = rank) -> TrainLoader:
            return loader(blocks, world=world, rank=rank, accumulation=accumulation, micro_batch=2)

        whole = make()
        number = 2 * whole.steps_per_epoch + 1
        states, steps = [], []
        for _ in range(number):
            states.append(json.dumps(whole.state_dict()))
            steps.append(shown(next(whole)))
        assert [json.loads(state)["offset"] for state in states[:2]] == [0, 1]
        for offset, state in enumerate(states):
            restored = make()
            restored.load_state_dict(json.loads(state))
            assert json.dumps(restored.state_dict()) == state
            assert [shown(step) for step in islice(restored, number - offset)] == steps[offset:]
        assert steps[0] != steps[whole.steps_per_epoch]


def test_a_restored_loader_touches_none_of_the_rows_before(packed: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = Blocks.arrays
    monkeypatch.setattr(Blocks, "arrays", lambda self, rows: made.append(len(rows)) or original(self, rows))
    one = loader(packed)
    one.load_state_dict({"epoch": 1000, "offset": one.steps_per_epoch - 1})
    assert made == []
    assert next(one).epoch == 1000
    assert len(made) == 4
    assert one.state_dict() == {"epoch": 1001, "offset": 0}


@pytest.mark.parametrize(
    "state",
    [{"epoch": 0, "offset": 3}, {"epoch": -1, "offset": 0}, {"epoch": 0, "offset": 0.5}, {"epoch": 0}, {"offset": "1"}],
)
def test_a_state_that_cannot_be_is_refused(packed: Blocks, state: LoaderState) -> None:
    one = loader(packed)
    assert one.steps_per_epoch == 3
    with pytest.raises(CheckpointError, match=r"(?s)steps 0 to 2.*Found: .*micro_batch") as caught:
        one.load_state_dict(state)
    assert len(str(caught.value).splitlines()) <= 5
    assert one.state_dict() == {"epoch": 0, "offset": 0}


def test_a_state_is_a_copy(packed: Blocks) -> None:
    one = loader(packed)
    one.state_dict()["offset"] = 2
    assert one.state_dict() == {"epoch": 0, "offset": 0}
