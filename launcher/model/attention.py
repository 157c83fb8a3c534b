"""Chooses the attention path for a device and hands it to transformers through its public AttentionInterface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from launcher.errors import RecipeError
from launcher.ops.attention import masked_attention, varlen_attention, varlen_missing

Core = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
CORES: dict[str, Core] = {"sdpa": masked_attention, "varlen": varlen_attention}


def choose_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """`model.attention` -> (path, why). Raises RecipeError when the path asked for cannot run here."""
    missing = varlen_missing(device, dtype)
    if wanted == "auto":
        return ("varlen", "fastest here") if missing is None else ("sdpa", missing)
    if wanted == "varlen" and missing is not None:
        raise RecipeError(f"model.attention=varlen: {missing}. Use model.attention=auto or sdpa.")
    return wanted, "as asked"


def attention_name(path: str) -> str:
    """The name under which transformers knows the path; a model is set to it once."""
    return f"packed_{path}"


def register_attention(path: str, core: Core | None = None) -> None:
    """Register the path's core, or `core`, its compiled form, with transformers in place of what was there."""
    attend_packed = core or CORES[path]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        boundaries = kwargs["cu_seqlens"] if path == "varlen" else attention_mask
        assert boundaries is not None, "PackedCausalLM passes the boundaries that its attention path reads"
        return attend_packed(query, key, value, boundaries, kwargs["scaling"]), None

    AttentionInterface.register(attention_name(path), attend)
