"""What can be compiled: named regions, defined by a caller that knows the model. Imports nothing of the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from launcher.recipe.schema import CompileSection


@dataclass(frozen=True)
class Region:
    """Modules of one kind, compiled in place with graphs in common, or one function that is replaced by its compiled
    form. `graphs`: how many of them warm-up must compile, one for each combination of mode (train, eval) and planned
    shape. `calls(tokens, train)`: how often a pass over a micro batch of so many positions calls the region; None: each
    module once."""

    name: str
    graphs: int
    modules: tuple[nn.Module, ...] = ()
    function: Callable[..., Any] | None = None
    install: Callable[[Callable[..., Any]], None] | None = None  # replaces the function by its compiled form
    calls: Callable[[int, bool], int] | None = None

    def forward_calls(self, tokens: int, train: bool) -> int:
        """Calls of compiled code in one forward pass."""
        return self.calls(tokens, train) if self.calls else len(self.modules)

    @property
    def backward_calls(self) -> int:
        """The fewest calls of compiled code in one backward pass: autograd cannot leave out a module that is trained,
        but it does leave out a norm below the first of them."""
        return sum(any(p.requires_grad for p in module.parameters()) for module in self.modules)


def select_regions(regions: Sequence[Region], compile: CompileSection) -> list[Region]:
    """The regions that `compile.scope` and `compile.regions` ask for.

    Scope layer compiles the decoder layer, model the whole body, regions the listed parts of them. The loss is outside
    the body, and is compiled in every scope when `compile.regions` lists it.
    """
    listed: set[str] = set(compile.regions)
    whole = {"layer": "layer", "model": "body"}
    wanted = listed if compile.scope == "regions" else {whole[compile.scope]} | ({"loss"} & listed)
    chosen = [region for region in regions if region.name in wanted]
    missing = wanted - {region.name for region in chosen}
    assert not missing, f"no region is named {missing}"
    return chosen
