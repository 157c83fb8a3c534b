"""Names the regions of a built model that a compile plan may choose from; compile/ knows nothing of the model."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from launcher.compile.regions import Region
from launcher.model.attention import CORES, register_attention
from launcher.model.build import BuiltModel
from launcher.model.families import layer_mlps, layer_norms
from launcher.model.lora import ADAPTER
from launcher.ops.linear_ce import chunk_loss, chunk_loss_and_grad


def regions_of(built: BuiltModel, *, shapes: int) -> list[Region]:
    """Training and evaluation call each region with every one of the planned `shapes`; the chunks of the loss have one
    shape, and each of its functions serves one of the two."""
    packed, losses, path = built.packed, built.packed.loss_functions, built.attention
    layers, mlps = len(packed.body.layers), layer_mlps(built.family, packed.body)

    def chunks(tokens: int) -> int:
        return math.ceil(packed.loss_rows(tokens) / packed.loss_chunk)

    return [
        Region("layer", 2 * shapes * kinds_of(packed.body.layers), modules=tuple(packed.body.layers)),
        Region("body", 2 * shapes, modules=(packed.body,)),
        Region("mlp", 2 * shapes * kinds_of(mlps), modules=mlps),
        Region("rmsnorm", 2 * shapes, modules=layer_norms(built.family, packed.body)),
        Region(
            "attention",
            2 * shapes,
            function=CORES[path],
            install=lambda f: register_attention(path, f),
            calls=lambda tokens, train: layers,
        ),
        Region(
            "loss",
            1,
            function=chunk_loss_and_grad,
            install=lambda f: setattr(losses, "loss_and_grad", f),
            calls=lambda tokens, train: chunks(tokens) if train else 0,
        ),
        Region(
            "loss",
            1,
            function=chunk_loss,
            install=lambda f: setattr(losses, "loss", f),
            calls=lambda tokens, train: 0 if train else chunks(tokens),
        ),
    ]


def kinds_of(modules: Iterable[nn.Module]) -> int:
    """How many of the modules differ in what is adapted, in which rank and scale: a graph serves those alike."""
    return len({tuple(_adapters(module)) for module in modules})


def _adapters(module: nn.Module) -> Iterator[tuple[str, int, float]]:
    one: Any
    for name, one in module.named_modules():
        if hasattr(one, "lora_A"):
            yield name, one.lora_A[ADAPTER].weight.shape[0], one.scaling[ADAPTER]
