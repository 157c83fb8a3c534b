"""Run by test_ranks.py, alone and under a two-process launch: one step's gradients and loss, written by rank 0."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from launcher.recipe.load import resolve  # noqa: E402
from launcher.runtime.environment import prepare_environment  # noqa: E402
from launcher.runtime.ranks import rank_info  # noqa: E402


def main() -> None:
    target, *argv = sys.argv[1:]
    info = rank_info()
    prepare_environment()
    from launcher.runtime.clock import Clock
    from launcher.train.inputs import prepare_inputs
    from launcher.train.request import Request
    from launcher.train.setup import Worker

    recipe = resolve(argv).recipe
    request = Request(recipe, "test", recipe.model.name, ROOT / "recipes", info)
    worker = Worker(request, prepare_inputs(request), clock=Clock())
    worker.build()
    worker.compile()
    torch.manual_seed(1)  # B starts at zero, and then no gradient of A has a direction
    with torch.no_grad():
        for parameter in worker.step.parameters:
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    loss = worker.step.accumulate(next(worker.batches))
    if info.is_main:
        torch.save({"loss": loss.clone(), "gradients": [p.grad.clone() for p in worker.step.parameters]}, target)
    worker.accelerator.end_training()


main()
