"""With train.deterministic two captured runs and a resumed one have the same bits."""

import pytest
import torch

from tests.support.states import flat, through_files, train
from tests.support.workers import compiled, perturb

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_dynamo")]
CAPTURED = {
    "compile": {"cuda_graphs": "on"},
    "train": {"steps": 12, "accumulation": 2, "deterministic": True},
}


@pytest.mark.parametrize(
    "sections",
    [
        {"lora": {"r": 16}},
        {"lora": {"r": 16, "dropout": 0.2}, "data": {"batching": "bucketed"}},
        {"model": {"dtype": "float16"}, "train": {"optimizer": "adamw_8bit"}, "lora": {"r": 64}},
        {"data": {"batching": "padded"}, "memory": {"activations": "full"}},
        {"model": {"dtype": "float32", "attention": "sdpa"}},
        {"compile": {"scope": "model"}},
    ],
)
def test_two_captured_runs_and_a_resumed_one_are_bit_equal(recipe_over, sections):
    recipe_of = recipe_over(CAPTURED)

    def worker_of():
        worker = compiled(recipe_of(**sections))
        assert worker.cuda_graphs.startswith("on"), worker.cuda_graphs
        perturb(worker)
        return worker

    whole = worker_of()
    before = train(whole, 4)
    middle = whole.state.state_dict()
    after, end = train(whole, 4), whole.state.state_dict()
    whole.release()
    second = worker_of()
    assert train(second, 8) == before + after
    assert flat(second.state.state_dict()) == flat(end)
    second.release()
    again = worker_of()
    again.state.load_state_dict(through_files(middle))
    assert train(again, 4) == after
    assert flat(again.state.state_dict()) == flat(end)
    again.release()
    assert before != after and not torch.are_deterministic_algorithms_enabled()
