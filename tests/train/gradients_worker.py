"""Run by test_ranks.py, alone and under a two-process launch: one step's gradients and loss in several layouts, written
by rank 0. Arguments: file, layouts as MICRO_BATCHxACCUMULATION with commas, recipe."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from launcher.recipe.load import resolve  # noqa: E402
from launcher.runtime.environment import prepare_environment  # noqa: E402
from launcher.runtime.ranks import RankInfo, rank_info  # noqa: E402


def gradients(argv: list[str], info: RankInfo) -> dict[str, torch.Tensor]:
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
    return {"loss": loss.clone(), "gradients": torch.cat([p.grad.flatten() for p in worker.step.parameters])}


def main() -> None:
    target, layouts, *argv = sys.argv[1:]
    info, results = rank_info(), {}
    prepare_environment()
    for layout in layouts.split(","):
        micro_batch, accumulation = layout.split("x")
        shape = [f"train.micro_batch={micro_batch}", f"train.accumulation={accumulation}"]
        results[f"{info.world_size} ranks x {layout}"] = gradients([*argv, *shape], info)
    if info.is_main:
        torch.save(results, target)
    if info.world_size > 1:
        torch.distributed.destroy_process_group()


main()
