"""The activation policy: what the forward pass keeps for the backward pass, and what is computed a second time.

    none        keep what the backward pass reads: nothing but the cheapest is computed twice
    selective   also recompute everything elementwise (norms, SwiGLU); no product and no attention runs twice
    budget b    keep at most about the fraction b of what `none` keeps, chosen by a knapsack over products and attention
    full        keep each layer's input, recompute the layer
    offload     as full, and these inputs wait in host memory (offload.py)

All are choices of torch's partitioner inside the compiled graph of a layer, made when it is compiled. There a
recomputed layer leaves out what its backward pass does not need (its last product), which a checkpoint around the layer
would not.

torch's partitioner recomputes dropout with another mask when it is given a budget: gradients would be wrong without a
sign of it (seen with torch 2.13, both backends; a test holds it). So a budget, `full` and `offload` are refused with
LoRA dropout.

Letters: N tokens of a micro batch, D model width, F feed-forward width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch._functorch.config

from launcher.errors import RecipeError
from launcher.memory.offload import INPUTS_ON_DEVICE
from launcher.recipe.schema import Recipe

MIB = 2**20
ROOM = 0.92  # of the memory that is free before training: what a forecast may fill


@dataclass(frozen=True)
class Shapes:
    """What decides how much a micro batch keeps."""

    layers: int
    tokens: int  # N
    hidden: int  # D
    query: int  # query heads times head width
    key_value: int  # key-value heads times head width
    intermediate: int  # F
    vocabulary: int  # V
    loss_chunk: int  # tokens whose logits live at once
    itemsize: int  # bytes of the compute dtype
    trainable: int  # parameters
    dropped: int = 0  # in-features of a layer's adapters, summed, where dropout gives each an input of its own


class Kept(NamedTuple):
    """What the partitioner is told, and where the layers' inputs wait."""

    budget: float  # fraction of what it would keep of itself
    elementwise: bool  # whether it keeps elementwise results that the backward pass reads as they are
    on_host: bool = False


KEPT = {  # by falling speed
    "none": Kept(1.0, True),
    "selective": Kept(1.0, False),
    "full": Kept(0.0, False),
    "offload": Kept(0.0, False, on_host=True),
}


@dataclass(frozen=True)
class Policy:
    """What is in force, and for `auto` why."""

    name: str
    kept: Kept
    why: str
    forecast_mib: float | None  # peak of allocated memory; None where it is not allocated on a GPU, or not compiled


def check_policy(recipe: Recipe, device: torch.device) -> None:
    """Raise RecipeError for a policy that this device, or the recipe's compilation or dropout, cannot honour."""
    memory, compile = recipe.memory, recipe.compile
    wanted = "memory.budget" if memory.budget is not None else f"memory.activations={memory.activations}"
    strict = memory.budget is not None or memory.activations in ("full", "offload")
    if memory.activations == "offload" and device.type != "cuda":
        raise RecipeError(
            f"{wanted} moves inputs from a GPU to the host; the device is {device.type}, its memory is the host's.\n"
            "Use memory.activations=full."
        )
    if compile.mode == "off" and (strict or memory.activations == "selective"):
        raise RecipeError(f"{wanted} is a choice of the compiler; compile.mode is off. Use memory.activations=auto.")
    if strict and recipe.lora.dropout:
        raise RecipeError(
            f"{wanted} recomputes, and dropout would draw another mask; lora.dropout is {recipe.lora.dropout:g}.\n"
            "Set lora.dropout=0, or memory.activations=selective."
        )
    if strict and compile.scope != "layer":
        raise RecipeError(
            f"{wanted} recomputes one compiled layer at a time; compile.scope={compile.scope} compiles other pieces.\n"
            "Use compile.scope=layer, or memory.activations=selective."
        )


def choose_policy(recipe: Recipe, shapes: Shapes, *, held_mib: float, free_mib: float | None) -> Policy:
    """`memory.activations` and `memory.budget` -> policy. auto: the fastest whose forecast fits; the least where none
    does. `held_mib` is allocated already, `free_mib` more can be; None on a CPU, where auto keeps everything."""
    memory, compiled = recipe.memory, recipe.compile.mode != "off"

    def policy(name: str, kept: Kept, why: str) -> Policy:
        known = free_mib is not None and compiled
        return Policy(name, kept, why, forecast(shapes, kept, held_mib=held_mib) if known else None)

    if memory.budget is not None:
        return policy(f"budget {memory.budget:g}", Kept(memory.budget, False), "as asked")
    if memory.activations != "auto":
        return policy(memory.activations, KEPT[memory.activations], "as asked")
    if free_mib is None or not compiled:
        return policy("none", KEPT["none"], "auto")
    names = ["none", "selective"]
    if not recipe.lora.dropout and recipe.compile.scope == "layer":
        names += ["full", "offload"]
    policies = [policy(name, KEPT[name], "auto: the fastest that fits") for name in names]
    limit = held_mib + ROOM * free_mib
    fitting = [found for found in policies if (found.forecast_mib or 0.0) <= limit]
    least = policy(names[-1], KEPT[names[-1]], "auto: nothing is forecast to fit, this is the least")
    return (fitting or [least])[0]


def forecast(shapes: Shapes, kept: Kept, *, held_mib: float) -> float:
    """Peak MiB of a training step over `held_mib` of weights and adapters: gradients and two moments of the adapters,
    what the layers keep on the device, and the larger of what the loss and what one layer's backward pass work with."""
    s = shapes
    token = s.itemsize * s.tokens / MIB  # MiB of one number a token
    # A layer's input, the sum after attention, the attention's inputs and output, gate and up; and the norms' outputs.
    selective = (2 * s.hidden + 2 * s.query + 2 * s.key_value + 2 * s.intermediate + s.dropped) * token
    everything = selective + 2 * s.hidden * token
    least = s.hidden * token
    layer = least + kept.budget * ((everything if kept.elementwise else selective) - least)
    # Of a feed-forward block: its input's gradient, h, what comes in and goes out, and gate and up dequantised.
    work = (3 * s.intermediate + 2 * s.hidden) * token + 2 * s.intermediate * s.hidden * s.itemsize / MIB
    if kept.budget < 1:
        work += everything - layer  # of the layer that is being recomputed
    loss = s.loss_chunk * s.vocabulary * s.itemsize / MIB + 3 * s.hidden * token
    adapters = 4 * 4 * s.trainable / MIB  # gradients summed, those of this pass, two moments; fp32
    layers = min(s.layers, INPUTS_ON_DEVICE) if kept.on_host else s.layers
    return held_mib + adapters + layers * layer + max(work, loss)


@contextmanager
def applied(policy: Policy) -> Iterator[None]:
    """While graphs are compiled, the partitioner keeps what the policy says."""
    with torch._functorch.config.patch(
        activation_memory_budget=policy.kept.budget, ban_recompute_materialized_backward=policy.kept.elementwise
    ):
        yield
