"""lora.init=eva: A begins with the directions in which the inputs of each adapted linear vary most (arXiv:2410.07170).

    inputs of a linear at the supervised tokens     X [n, D], less its mean
    A [r, D]                                        the first r right singular vectors of X
    B                                               zero, so the start computes what the base computes

As in PEFT by its defaults: centred, not whitened (each row of A has length 1), the tokens that the loss sees, one
decomposition for linears that share an input. Ranks stay as the recipe has them (rho = 1).

One layer at a time: it is given its inputs of all batches, and makes the next layer's of them. So the inputs of the
linears are held for one layer only.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from launcher.errors import RecipeError
from launcher.model.grouped import ungrouped
from launcher.model.lora import ADAPTER
from launcher.model.low_rank import NEGLIGIBLE, leading_svd
from launcher.model.packed import Body, PackedCausalLM


@dataclass
class SharedInput:
    """One input, and the linears that are given it; `parts`: its rows, [n, D] of each batch."""

    linears: dict[str, Any]
    parts: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def eva_start(packed: PackedCausalLM, batches: Sequence[tuple[Tensor, ...]], *, targets: int, seed: int) -> int:
    """Write A of every adapted linear of `packed`, whose B is zero, from the first `targets` supervised tokens of
    `batches` (arguments of its forward); returns how many there were.

    Raises RecipeError, naming the linear, where its inputs vary in fewer directions than its rank.
    """
    rows, left = [], targets
    for _, labels, *_ in batches:
        rows.append((labels.flatten() >= 0).nonzero()[:left, 0])
        left -= len(rows[-1])
    hidden = [packed.body_inputs(ids, *rest)[0] for ids, _, *rest in batches]
    for number, layer in enumerate(packed.body.layers):
        one = Body(nn.ModuleList([layer]), nn.Identity(), packed.body.kinds[number : number + 1])
        shared: list[SharedInput] = []
        with ungrouped(layer):
            for index, (ids, _, *rest) in enumerate(batches):
                inputs = packed.body_inputs(ids, *rest)[1]
                with _collected(layer, shared, rows[index]):
                    hidden[index] = one(hidden[index], inputs, rest[-1], packed.max_seqlen)
        for same in shared:
            _start(same, f"model.layers.{number}", seed=seed)
    return targets - left


@contextmanager
def _collected(layer: nn.Module, shared: list[SharedInput], rows: Tensor) -> Iterator[None]:
    """Inside, each call of an adapted linear adds the `rows` of its input to those of `shared`."""
    calls: list[tuple[str, Any, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda own, given, name=name: calls.append((name, own, given[0])))
        for name, module in layer.named_modules()
        if hasattr(module, "lora_A")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    by_input: dict[int, list[tuple[str, Any, Tensor]]] = {}
    for call in calls:  # `calls` holds each tensor, so no two have one id
        by_input.setdefault(id(call[2]), []).append(call)
    if not shared:
        shared += [SharedInput({name: own for name, own, _ in same}) for same in by_input.values()]
    for one, same in zip(shared, by_input.values(), strict=True):
        assert [*one.linears] == [name for name, *_ in same], "every batch goes through the same linears"
        one.parts.append(same[0][2].flatten(0, -2)[rows])


def _start(shared: SharedInput, layer: str, *, seed: int) -> None:
    """Write A of the linears of one input, and free its rows. Each takes as many directions as its rank."""
    x = torch.cat(shared.parts).float()
    shared.parts.clear()
    x -= x.mean(0)
    ranks = {name: linear.r[ADAPTER] for name, linear in shared.linears.items()}
    name, rank = max(ranks.items(), key=lambda item: item[1])
    _, values, directions = leading_svd(x, min(rank, *x.shape), seed=seed)
    found = int((values > NEGLIGIBLE * values[0]).sum()) if len(values) else 0
    if found < rank:
        raise RecipeError(
            f"lora.init=eva needs inputs that vary in as many directions as the rank; those of {layer}.{name} vary in "
            f"{found} over {len(x):,} supervised tokens of the first batches, its rank is {rank}.\n"
            "Lower lora.r, or use lora.init=default."
        )
    for name, linear in shared.linears.items():
        linear.lora_A[ADAPTER].weight.copy_(directions[: ranks[name]])
