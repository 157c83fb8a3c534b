"""Models that cannot be trained here whatever their sizes are, by what their config.json says; imports no torch."""

import re
from collections.abc import Mapping
from typing import Any

from launcher.errors import RecipeError

EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")
TOWER = re.compile(r"(vision|visual|audio|speech|image|video|vq)_.*config|vision_tower")
RECURRENT = re.compile(r"(mamba|ssm|rwkv|lru|xlstm|linear_conv|short_conv|conv)_.+|.*_(mamba|ssm)_.+|conv1d_width")
LAYERS = ("full_attention", "sliding_attention")  # kinds of layers that compute nothing but attention over tokens


def refuse_untrainable(model_type: str, config: Mapping[str, Any]) -> None:
    """Raise RecipeError, in one line, for a model with a part that is not trained here. `config`: config.json, or all
    that transformers makes of it."""
    if part := untrainable_part({"model_type": model_type, **config}):
        raise untrainable(model_type, part)


def untrainable(model_type: str, part: str) -> RecipeError:
    """`part` completes "... has "."""
    return RecipeError(f"{model_type!r} has {part}, which is not trained here; stock Transformers + PEFT runs it.")


def untrainable_part(config: Mapping[str, Any]) -> str | None:
    """The first such part, with the key that says so; None where there is none."""
    if config.get("is_encoder_decoder"):
        return "an encoder beside its decoder (is_encoder_decoder)"
    for key, value in config.items():
        if TOWER.fullmatch(key) and value:
            return f"a tower for other input than text ({key})"
        if EXPERTS.fullmatch(key) and type(value) is int and value > 1:
            return f"experts in place of a feed-forward ({key}={value})"
    kinds = config.get("layer_types")
    others = [kind for kind in kinds if kind not in LAYERS] if isinstance(kinds, list | tuple) else []
    if others:
        return f"recurrent or other layers than attention (layer_types: {others[0]})"
    if re.match("rwkv|x?lstm|mamba", str(config.get("model_type"))):
        return "recurrent layers"
    for key, value in config.items():
        if RECURRENT.fullmatch(key) and value:
            return f"recurrent or convolutional layers ({key}={value!r})"
    return None
