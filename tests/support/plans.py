"""A small module, a compile plan for it, and how a strict plan stops."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.compile.observe import Observer
from launcher.compile.plan import Plan
from launcher.compile.regions import Region
from launcher.errors import ContractError
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


def refuse(graph: Any, inputs: Any) -> Any:
    """A backend, or the compiler of a backward pass, that fails."""
    raise torch._inductor.exc.InductorError(RuntimeError("planted"), None)


@contextmanager
def stopped(mode: str, message: str) -> Iterator[None]:
    """A strict plan stops with this message, in at most ten lines and with code 9; in warn mode nothing stops."""
    if mode == "warn":
        yield
        return
    with pytest.raises(ContractError, match=message) as caught:
        yield
    assert caught.value.code == 9 and len(str(caught.value).splitlines()) <= 10
