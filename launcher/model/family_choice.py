"""Which family a config is of, and whether the compiled forward computes what that config says; imports no torch."""

from typing import Any

from launcher.errors import RecipeError
from launcher.model.families import FAMILIES, Family, stock_setting
from launcher.model.layer_kinds import check_layers, layer_kinds
from launcher.model.untrainable import refuse_untrainable


def family_of(config: Any, *, max_length: int, auto: bool = False) -> Family:
    """The family of a config, after checking that the compiled forward computes what the config says. `auto`: also of
    an architecture without a row (model.family=auto), of which layer_shape.py finds the rest.

    `config` is transformers', or has only what config.json says: what that leaves out is not checked.

    Raises RecipeError for an unknown family, a length beyond the model's positions, and as `check_layers`.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        family = _without_row(config, auto=auto)
    if max_length > getattr(config, "max_position_embeddings", max_length):
        raise RecipeError(
            f"data.max_length may be at most the model's {config.max_position_embeddings} positions; "
            f"it is {max_length}. Lower data.max_length."
        )
    check_layers(config, max_length=max_length)
    if not family.named and stock_setting(config, "sliding_window") is not None:
        _refuse_windows(config, max_length=max_length)
    return family


def _refuse_windows(config: Any, *, max_length: int) -> None:
    """Not tried: the comparison before the first step takes shorter documents, which may not fill the window."""
    windows = [kind.window for kind in layer_kinds(config, max_length=max_length) if kind.window is not None]
    if windows:
        tokens = min(windows)
        raise RecipeError(
            f"with model.family=auto no sliding window may be shorter than data.max_length, {max_length}; "
            f"{config.model_type!r} has one of {tokens} tokens.\nSet data.max_length={tokens} or lower "
            "(docs/any-model.md)."
        )


def _without_row(config: Any, *, auto: bool) -> Family:
    refuse_untrainable(config.model_type, config.to_dict() if hasattr(config, "to_dict") else vars(config))
    if not auto:
        known = ", ".join(sorted(FAMILIES))
        raise RecipeError(
            f"model architectures supported are {known}; this model is {config.model_type!r}.\n"
            "model.family=auto tries it: it is trained if it is found equal to stock code before the first step."
        )
    return Family(config.model_type, norms=(), mlp="", named=False)
