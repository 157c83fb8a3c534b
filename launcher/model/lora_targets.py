"""Which linears of the decoder get an adapter, of which rank and alpha, told from the recipe and the modules' names."""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple, TypeVar

from torch import nn

from launcher.errors import RecipeError
from launcher.model.weight_files import linear_weights
from launcher.recipe.lora_section import (
    ALL_LINEAR,
    EXPRESSION,
    FUSED_PROJECTIONS,
    LoraSection,
    cut_by_comma,
    fused_targets,
)

Number = TypeVar("Number", int, float)

LAYER = re.compile(r"\.layers\.(\d+)\.")


class Adapted(NamedTuple):
    """A linear that gets an adapter."""

    linear: nn.Linear
    rank: int
    alpha: float
    dora: bool

    @property
    def matrices(self) -> int:
        """Numbers of A [r, in] and B [out, r]."""
        return self.rank * (self.linear.in_features + self.linear.out_features)

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        return self.matrices + (self.linear.out_features if self.dora else 0)


def adapted_linears(model: nn.Module, lora: LoraSection) -> dict[str, Adapted]:
    """The linears of the decoder layers that get an adapter, by name. `model` has no adapters yet."""
    chosen, found, targets = lora.chosen_layers, {}, fitted_targets(model, lora.targets)
    for weight, linear in linear_weights(model).items():
        name = weight.removesuffix(".weight")
        in_layer = not chosen or any(_layer(name) in numbers for numbers in chosen)
        if in_layer and any(_is_target(name, target) for target in targets):
            rank = _by_pattern(lora.rank_pattern, name, lora.r)
            found[name] = Adapted(linear, rank, _by_pattern(lora.alpha_pattern, name, lora.alpha), lora.dora)
    return found


def module_names(model: nn.Module, lora: LoraSection) -> list[str]:
    """PEFT's `target_modules`: the last words of names where that says it all, else whole names."""
    names = adapted_linears(model, lora)
    whole = lora.layers or any(target.startswith(EXPRESSION) for target in lora.targets)
    return list(names) if whole else list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def fitted_targets(model: nn.Module, targets: Collection[str]) -> list[str]:
    """`targets` as `model` names them: a fused projection stands for its parts where all of them are named."""
    linears = {weight.removesuffix(".weight").rpartition(".")[2] for weight in linear_weights(model)}
    return fused_targets(linears, targets)


def target_notes(model: nn.Module, targets: Collection[str]) -> tuple[str, ...]:
    """What is said where a fused projection stands for its parts."""
    fused = [name for name in fitted_targets(model, targets) if name not in targets]
    return tuple(
        f"lora.targets: {name} stands for {', '.join(FUSED_PROJECTIONS[name])}, which it holds" for name in fused
    )


def check_targets(model: nn.Module, lora: LoraSection) -> None:
    """Raise RecipeError naming every target, layer and pattern that no linear of the decoder has."""
    names = [weight.removesuffix(".weight") for weight in linear_weights(model)]
    if unmatched := [t for t in fitted_targets(model, lora.targets) if not any(_is_target(name, t) for name in names)]:
        raise RecipeError(
            f"lora.targets must name linear layers of the decoder; {', '.join(unmatched)} matched nothing.\n"
            f"This model has: {', '.join(sorted({name.rpartition('.')[2] for name in names}))}."
            f"{next(filter(None, (cut_by_comma(lora.targets, target) for target in unmatched)), '')}"
        )
    last = max(_layer(name) for name in names)
    if missing := [numbers[-1] for numbers in lora.chosen_layers if numbers[-1] > last]:
        raise RecipeError(f"lora.layers must be of the model, which has the layers 0-{last}; {missing[0]} is none.")
    adapted = adapted_linears(model, lora)
    if not adapted:
        raise RecipeError("lora.targets and lora.layers must name a linear together; none is in both. Change one.")
    _check_patterns("lora.rank_pattern", lora.rank_pattern, adapted)
    _check_patterns("lora.alpha_pattern", lora.alpha_pattern, adapted)
    for name, one in adapted.items():
        most = min(one.linear.in_features, one.linear.out_features)
        if lora.starts_from_weights and one.rank > most:
            raise RecipeError(
                f"lora.init={lora.init} takes as many components out of a weight as the rank; {name} has {most}, its "
                f"rank is {one.rank}.\nLower lora.r, or give it a rank of its own in lora.rank_pattern."
            )


def _check_patterns(key: str, patterns: Mapping[str, float], names: Collection[str]) -> None:
    """PEFT takes the first that matches, and sorts them when it saves: one name may have one."""
    if unmatched := [pattern for pattern in patterns if not any(_ends_with(name, pattern) for name in names)]:
        raise RecipeError(
            f"{key} must match adapted modules; {', '.join(unmatched)} matched none.\n"
            f"A pattern matches the end of a name, from a dot on. One of the names: {next(iter(names))}."
        )
    for name in names:
        if len(several := [pattern for pattern in patterns if _ends_with(name, pattern)]) > 1:
            both = " and ".join(several)
            raise RecipeError(f"{key} must have one pattern a module; {name} has {both}.\nMake one of them narrower.")


def _layer(name: str) -> int:
    return int(LAYER.findall(name)[0])


def _is_target(name: str, target: str) -> bool:
    if target.startswith(EXPRESSION):
        return re.fullmatch(target.removeprefix(EXPRESSION), name) is not None
    return target in (ALL_LINEAR, name.rpartition(".")[2])


def _ends_with(name: str, pattern: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _by_pattern(patterns: Mapping[str, Number], name: str, default: Number) -> Number:
    return next((value for pattern, value in patterns.items() if _ends_with(name, pattern)), default)
