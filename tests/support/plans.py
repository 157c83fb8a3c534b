"""A small module, and a compile plan for it."""

from typing import Any

import torch
from torch import Tensor, nn

from launcher.compile.observe import Observer
from launcher.compile.plan import Plan
from launcher.compile.regions import Region
from launcher.recipe.schema import CompileSection


class Block(nn.Module):
    """Compiles without a break."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


class Other(Block):
    """Another program with the same parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def plan_for(
    *modules: nn.Module, mode: Any = "strict", graphs: int = 1, backend: str = "aot_eager", **settings: Any
) -> tuple[Plan, Observer]:
    """A plan that compiles the modules as region "layer", of which warm-up must compile `graphs`."""
    observer = Observer()
    compile = CompileSection(mode=mode, scope="layer", regions=[], backend=backend)
    return Plan([Region("layer", graphs, modules=modules)], compile=compile, observer=observer, **settings), observer


def call(block: nn.Module, *sizes: int) -> None:
    """Call the block with an input of each of these numbers of rows."""
    for rows in sizes:
        block(torch.ones(rows, 8))
