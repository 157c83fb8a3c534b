"""Names the regions of a built model that a compile plan may choose from; compile/ knows nothing of the model."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from launcher.compile.regions import Region
from launcher.model.attention import CORES, register_attention
from launcher.model.build import BuiltModel
from launcher.model.families import layer_mlps, layer_norms
from launcher.model.lora import ADAPTER
from launcher.ops.capped_ce import chunk_functions


def regions_of(built: BuiltModel, *, shapes: int) -> list[Region]:
    """Training and evaluation call each region with every one of the planned `shapes`, and layers of several kinds have
    as many graphs each; the chunks of the loss have one shape, and each of its functions serves one of the two."""
    packed, losses, path = built.packed, built.packed.loss_functions, built.attention
    layers, mlps = len(packed.body.layers), layer_mlps(built.family, packed.body)
    plain, kinds = chunk_functions(packed.logits_rule.cap), kinds_of(packed.body.layers, packed.layer_code())
    of_training = "loss_and_grad" if packed.trained is None else "loss_and_grads"

    def chunks(tokens: int) -> int:
        return math.ceil(packed.loss_rows(tokens) / packed.loss_chunk)

    return [
        Region("layer", 2 * shapes * kinds, modules=tuple(packed.body.layers)),
        Region("body", 2 * shapes, modules=(packed.body,)),
        Region("mlp", 2 * shapes * kinds_of(mlps), modules=mlps),
        Region("rmsnorm", 2 * shapes, modules=layer_norms(built.family, packed.body)),
        Region(
            "attention",
            2 * shapes * len(set(packed.windows)),
            function=CORES[path],
            install=lambda f: register_attention(path, f),
            calls=lambda tokens, train: layers,
        ),
        Region(
            "loss",
            1,
            function=getattr(plain, of_training),
            install=lambda f: setattr(losses, of_training, f),
            calls=lambda tokens, train: chunks(tokens) if train else 0,
        ),
        Region(
            "loss",
            1,
            function=plain.loss,
            install=lambda f: setattr(losses, "loss", f),
            calls=lambda tokens, train: 0 if train else chunks(tokens),
        ),
    ]


def kinds_of(modules: nn.ModuleList | Sequence[nn.Module], code: Sequence[Any] | None = None) -> int:
    """How many of the modules differ in what is adapted, in which rank and scale, or in `code`: a graph serves those
    alike."""
    return len({(*_adapters(module), one) for module, one in zip(modules, code or [None] * len(modules), strict=True)})


def _adapters(module: nn.Module) -> Iterator[tuple[str, int, float]]:
    one: Any
    for name, one in module.named_modules():
        if hasattr(one, "lora_A"):
            yield name, one.lora_A[ADAPTER].weight.shape[0], one.scaling[ADAPTER]
