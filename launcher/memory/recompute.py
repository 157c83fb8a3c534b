"""The activation policy: what the forward pass keeps for the backward pass, and what is computed a second time.

    none        keep what the backward pass reads: nothing but the cheapest is computed twice
    selective   also recompute everything elementwise (norms, SwiGLU); no product and no attention runs twice
    budget b    keep at most about the fraction b of what `none` keeps, chosen by a knapsack over products and attention
    full        keep each layer's input, recompute the layer

All four are choices of torch's partitioner inside the compiled graph of a layer, made when it is compiled. There a
recomputed layer leaves out what its backward pass does not need (its last product), which a checkpoint around the layer
would not.

torch's partitioner recomputes dropout with another mask when it is given a budget: gradients would be wrong without a
sign of it (seen with torch 2.13, both backends; a test holds it). So a budget and `full` are refused with LoRA dropout.

Letters: N tokens of a micro batch, D model width, F feed-forward width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch._functorch.config

from launcher.errors import RecipeError
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


@dataclass(frozen=True)
class Policy:
    """What is in force, and for `auto` why."""

    name: str
    keep: float  # the partitioner's budget
    why: str
    forecast_mib: float | None  # peak of allocated memory; None where it is not allocated on a GPU


def check_policy(recipe: Recipe) -> None:
    """Raise RecipeError for a policy that this recipe's compilation or dropout cannot honour."""
    memory, compile = recipe.memory, recipe.compile
    wanted = "memory.budget" if memory.budget is not None else f"memory.activations={memory.activations}"
    strict = memory.budget is not None or memory.activations == "full"
    if compile.mode == "off" and (strict or memory.activations == "selective"):
        raise RecipeError(f"{wanted} is a choice of the compiler; compile.mode is off. Use memory.activations=auto.")
    if strict and recipe.lora.dropout:
        raise RecipeError(
            f"{wanted} recomputes, and dropout would draw another mask; lora.dropout is {recipe.lora.dropout:g}.\n"
            "Set lora.dropout=0, or memory.activations=selective."
        )
    if memory.activations == "full" and compile.scope == "model":
        raise RecipeError(
            "memory.activations=full recomputes a graph at a time; compile.scope=model makes one of all layers.\n"
            "Use compile.scope=layer."
        )


def choose_policy(recipe: Recipe, shapes: Shapes, *, held_mib: float, free_mib: float | None) -> Policy:
    """`memory.activations` and `memory.budget` -> policy. auto: the fastest whose forecast fits; the least where none
    does. `held_mib` is allocated already, `free_mib` more can be; None on a CPU, where auto keeps everything."""
    memory = recipe.memory

    def policy(name: str, keep: float, why: str) -> Policy:
        return Policy(name, keep, why, None if free_mib is None else forecast(shapes, keep, held_mib=held_mib))

    if memory.budget is not None:
        return policy(f"budget {memory.budget:g}", memory.budget, "as asked")
    kept = {"none": 1.0, "selective": SELECTIVE, "full": 0.0}
    if memory.activations != "auto":
        return policy(memory.activations, kept[memory.activations], "as asked")
    if free_mib is None or recipe.compile.mode == "off":
        return policy("none", 1.0, "auto")
    if recipe.lora.dropout or recipe.compile.scope == "model":
        kept.pop("full")
    limit = held_mib + ROOM * free_mib
    policies = [policy(name, keep, "auto: the fastest that fits") for name, keep in kept.items()]
    fitting = [found for found in policies if (found.forecast_mib or 0.0) <= limit]
    return (
        fitting[0]
        if fitting
        else policy(*list(kept.items())[-1], "auto: nothing is forecast to fit, this is the least")
    )


SELECTIVE = 0.999  # below 1 the partitioner first tries what recomputes elementwise work alone


def forecast(shapes: Shapes, keep: float, *, held_mib: float) -> float:
    """Peak MiB of a training step over `held_mib` of weights and adapters: gradients and two moments of the adapters,
    what every layer keeps, and the larger of what the loss and what one layer's backward pass work with."""
    s = shapes
    token = s.itemsize * s.tokens / MIB  # MiB of one number a token
    selective = (3 * s.hidden + 2 * s.query + 2 * s.key_value + 2 * s.intermediate) * token
    everything = selective + (3 * s.hidden + s.intermediate) * token
    least = s.hidden * token
    layer = {1.0: everything, SELECTIVE: selective}.get(keep, least + keep * (everything - least))
    work = (4 * s.intermediate + 2 * s.hidden) * token + s.intermediate * s.hidden * s.itemsize / MIB
    if keep < SELECTIVE:
        work += everything - layer  # of the layer that is being recomputed
    loss = s.loss_chunk * s.vocabulary * s.itemsize / MIB + 3 * s.hidden * token
    adapters = 4 * 4 * s.trainable / MIB  # gradients summed, those of this pass, two moments; fp32
    return held_mib + adapters + s.layers * layer + max(work, loss)


@contextmanager
def applied(policy: Policy) -> Iterator[None]:
    """While graphs are compiled, the partitioner keeps what the policy says."""
    with torch._functorch.config.patch(
        activation_memory_budget=policy.keep if policy.keep != SELECTIVE else 1.0,
        ban_recompute_materialized_backward=policy.keep != SELECTIVE,
    ):
        yield
