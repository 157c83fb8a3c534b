"""The activation policy: what the forward pass keeps for the backward pass, and what is recomputed.

    none        keep whatever the backward pass reads, recompute only the cheapest operations
    selective   also recompute everything elementwise (norms, SwiGLU); no product and no attention runs twice
    budget b    keep about the fraction b of what `none` keeps; a knapsack chooses among products and attention
    full        keep each layer's input, recompute the layer
    offload     like full, with these inputs in host memory (offload.py)

All of them are settings of torch's partitioner, which acts inside the compiled graph of a layer. There a recomputed
layer leaves out what its backward pass does not need (its last product); a checkpoint around the layer would not.

Given a budget, torch's partitioner recomputes dropout with another mask: the gradients would be wrong without any sign
of it (seen with torch 2.13, both backends; a test holds it). So a budget, `full` and `offload` are refused together
with LoRA dropout.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch._functorch.config

from launcher.errors import RecipeError
from launcher.memory.forecast import KEEP_ALL, Kept, Shapes, forecast
from launcher.recipe.schema import Recipe

USABLE = 0.92  # share of the memory free before training that a forecast may fill


KEPT = {  # fastest first
    "none": KEEP_ALL,
    "selective": Kept(1.0, False),
    "full": Kept(0.0, False),
    "offload": Kept(0.0, False, on_host=True),
}


@dataclass(frozen=True)
class Policy:
    """The policy of a run, and why it was chosen."""

    name: str
    kept: Kept
    why: str
    forecast_mib: float | None  # peak of allocated memory; None on a CPU or without compilation


def check_policy(recipe: Recipe, device: torch.device) -> None:
    """Raise RecipeError for a policy that the device, the recipe's compilation or its dropout does not allow."""
    memory, compile = recipe.memory, recipe.compile
    wanted = "memory.budget" if memory.budget is not None else f"memory.activations={memory.activations}"
    by_budget = memory.budget is not None or memory.activations in ("full", "offload")
    if memory.activations == "offload" and device.type != "cuda":
        raise RecipeError(
            f"{wanted} moves inputs from a GPU to the host; the device is {device.type}, its memory is the host's.\n"
            "Use memory.activations=full."
        )
    if compile.mode == "off" and (by_budget or memory.activations == "selective"):
        raise RecipeError(f"{wanted} is a choice of the compiler; compile.mode is off. Use memory.activations=auto.")
    if by_budget and recipe.lora.dropout:
        raise RecipeError(
            f"{wanted} recomputes, and dropout would draw another mask; lora.dropout is {recipe.lora.dropout:g}.\n"
            "Set lora.dropout=0, or memory.activations=selective."
        )
    if by_budget and compile.scope != "layer":
        raise RecipeError(
            f"{wanted} recomputes one compiled layer at a time; compile.scope={compile.scope} compiles other pieces.\n"
            "Use compile.scope=layer, or memory.activations=selective."
        )


def choose_policy(recipe: Recipe, shapes: Shapes, *, held_mib: float, free_mib: float | None) -> Policy:
    """`memory.activations` and `memory.budget` -> policy. auto: the fastest whose forecast fits, or the one that needs
    the least where none does. `held_mib` is allocated already; `free_mib` more is available (None on a CPU, where auto
    keeps everything)."""
    memory, compiled = recipe.memory, recipe.compile.mode != "off"

    def policy(name: str, kept: Kept, why: str) -> Policy:
        peak = forecast(shapes, kept, held_mib=held_mib) if free_mib is not None and compiled else None
        return Policy(name, kept, why, peak)

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
    limit = held_mib + USABLE * free_mib
    fitting = [candidate for candidate in policies if (candidate.forecast_mib or 0.0) <= limit]
    least = policy(names[-1], KEPT[names[-1]], "auto: nothing is forecast to fit, this is the least")
    return (fitting or [least])[0]


@contextmanager
def applied(policy: Policy) -> Iterator[None]:
    """Inside, graphs are compiled under the policy."""
    with torch._functorch.config.patch(
        activation_memory_budget=policy.kept.budget, ban_recompute_materialized_backward=policy.kept.elementwise
    ):
        yield
