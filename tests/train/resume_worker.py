"""Run by test_ranks.py under a two-process launch: with every kind of batching, six steps at once and with an
interruption after three must leave the same bits on every rank. Argument: recipe."""

import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from launcher.recipe.load import resolve  # noqa: E402
from launcher.runtime.environment import prepare_environment  # noqa: E402
from launcher.runtime.ranks import rank_info  # noqa: E402

KINDS = {
    "packed": ["train.optimizer=adamw_8bit", "lora.r=64"],
    "bucketed": ["data.batching=bucketed", "model.dtype=float16"],
    "padded": ["data.batching=padded", "train.accumulation=2"],
    "streamed": ["data.streaming=true", "data.validation=0"],
}


def worker_of(recipe: Any) -> Any:
    from launcher.runtime.clock import Clock
    from launcher.train.inputs import prepare_inputs
    from launcher.train.request import Request
    from launcher.train.setup import Worker

    request = Request(recipe, "test", recipe.model.name, ROOT / "recipes", rank_info())
    worker = Worker(request, prepare_inputs(request), clock=Clock())
    worker.build()
    worker.compile()
    return worker


def main() -> None:
    prepare_environment()
    from launcher.data import stream
    from tests.support.arguments import replaced
    from tests.support.states import flat, through_files, train

    stream.WINDOW_BLOCKS = 4  # so that a step or two use a window up
    for kind, arguments in KINDS.items():
        recipe = resolve(replaced(sys.argv[1:], *arguments)).recipe
        whole = worker_of(recipe)
        train(whole, 3)
        middle = whole.state.state_dict()
        after, end = train(whole, 3), whole.state.state_dict()  # before the generators are set back
        again = worker_of(recipe)
        again.state.load_state_dict(through_files(middle))
        assert train(again, 3) == after, kind
        end = whole.state.state_dict()
        assert flat(again.state.state_dict()) == flat(end), kind
        assert flat(middle) != flat(end) and list(end["random"]) == ["0", "1"], kind
        first, second = (end["random"][rank]["torch"] for rank in ("0", "1"))
        assert not torch.equal(first, second), f"{kind}: the ranks drop the same"
        print(f"{kind} goes on", flush=True)
    torch.distributed.destroy_process_group()


main()
