"""Models of any architecture with random weights, for the comparison before the first step."""

from typing import Any

import torch

from launcher.model.attention import BlockFacts
from launcher.model.build import BuiltModel, build_model, check_model
from launcher.recipe.schema import Recipe
from tests.conftest import small_config


def build_any(
    model_type: str,
    *,
    dtype: str = "float32",
    length: int = 64,
    quant: str = "nf4",
    device: str = "cpu",
    lora: dict[str, Any] | None = None,
    **changes: Any,
) -> BuiltModel:
    """For blocks of `length`; `changes` of the config at test size."""
    recipe = Recipe.model_validate(
        {
            "model": {"init": "random", "dtype": dtype, "family": "auto"},
            "quant": {"type": quant},
            "lora": {"r": 4, **(lora or {})},
            "data": {"max_length": length},
            "train": {"steps": 1},
        }
    )
    config, where = small_config(model_type, **changes), torch.device(device)
    check_model(recipe, "", config, where)
    blocks, ids = BlockFacts((length,), alone=False), [int(token) for token in recipe.lora.trainable_tokens]
    return build_model(recipe, "", config, device=where, blocks=blocks, phase=lambda _: None, token_ids=ids)
