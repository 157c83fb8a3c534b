"""Which linears of a model `lora.targets` names."""

from collections.abc import Collection

from torch import nn

from launcher.errors import RecipeError
from launcher.model.weight_files import linear_weights

FUSED_PROJECTIONS = {  # a projection in which some models hold several, and which these are; Phi-3 has both
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def fitted_targets(model: nn.Module, targets: Collection[str]) -> list[str]:
    """`targets` as `model` names them: a fused projection stands for its parts where all of them are named."""
    linears, fitted = linear_names(model), list(dict.fromkeys(targets))
    for fused, parts in FUSED_PROJECTIONS.items():
        if fused in linears and not linears & {*parts} and {*parts} <= {*fitted}:
            fitted = list(dict.fromkeys(fused if name in parts else name for name in fitted))
    return fitted


def linear_names(model: nn.Module) -> set[str]:
    """The names of the linears in the decoder layers."""
    return {name.removesuffix(".weight").rpartition(".")[2] for name in linear_weights(model)}


def check_targets(model: nn.Module, targets: Collection[str]) -> None:
    """Raise RecipeError naming every LoRA target that is not a linear of the decoder layers."""
    linears = linear_names(model)
    unmatched = [name for name in fitted_targets(model, targets) if name not in linears]
    if unmatched:
        raise RecipeError(
            f"lora.targets must name linear layers of the decoder; {', '.join(unmatched)} matched nothing.\n"
            f"This model has: {', '.join(sorted(linears))}."
        )


def target_notes(model: nn.Module, targets: Collection[str]) -> tuple[str, ...]:
    """What is said where a fused projection stands for its parts."""
    fused = [name for name in fitted_targets(model, targets) if name not in targets]
    return tuple(
        f"lora.targets: {name} stands for {', '.join(FUSED_PROJECTIONS[name])}, which it holds" for name in fused
    )
