"""What may be compiled: named regions, handed over by whoever knows the model. Imports nothing of the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from launcher.recipe.schema import CompileSection


@dataclass(frozen=True)
class Region:
    """Modules of one kind, compiled in place and sharing their graphs, or one function that is replaced by its
    compiled form. `graphs` is how many a healthy run compiles: one for each way the region is called (train or eval,
    and each planned shape)."""

    name: str
    graphs: int
    modules: tuple[nn.Module, ...] = ()
    function: Callable[..., Any] | None = None
    install: Callable[[Callable[..., Any]], None] | None = None  # puts the (compiled) function in its place


def select(regions: Sequence[Region], compile: CompileSection) -> list[Region]:
    """The regions that `compile.scope` and `compile.regions` ask for.

    Scope layer compiles the decoder layer, model the whole body, regions the named pieces inside them; the loss stands
    outside the body and is compiled in every scope when `compile.regions` lists it.
    """
    pieces: set[str] = set(compile.regions)
    whole = {"layer": "layer", "model": "body"}
    wanted = pieces if compile.scope == "regions" else {whole[compile.scope]} | ({"loss"} & pieces)
    chosen = [region for region in regions if region.name in wanted]
    missing = wanted - {region.name for region in chosen}
    assert not missing, f"no region is named {missing}"
    return chosen
