"""Chooses the attention path for a device and registers it with transformers' public AttentionInterface."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from launcher.errors import RecipeError
from launcher.model.layer_kinds import AttentionNeeds
from launcher.ops.document_attention import (
    capped_attention,
    causal_attention,
    cudnn_attention,
    fused_missing,
    masked_attention,
    varlen_attention,
)

Core = Callable[[Tensor, Tensor, Tensor, Any, float], Tensor]
CORES: dict[str, Core] = {
    "sdpa": masked_attention,
    "capped": capped_attention,
    "varlen": varlen_attention,
    "causal": causal_attention,
    "cudnn": cudnn_attention,
}
MASKED = ("sdpa", "capped")  # paths that read a mask
FUSED = {"varlen": (8, 0), "cudnn": (8, 0)}  # half-precision CUDA kernels, and the compute capability they need
NO_NEEDS = AttentionNeeds()
CUDNN_WINS = 9  # the major compute capability where cuDNN is fastest: measured on an H200, and on nothing newer


@dataclass(frozen=True)
class BlockFacts:
    """What the model knows of a run's blocks (packed sequences) before the first one.

    `widths`: their planned lengths in positions. `alone`: whether every block holds one document. `targets`: by width,
    the most supervised tokens of a micro batch; of a width that it lacks, all may be. `max_seqlen`: upper bound on
    document length; None: the width of a block.
    """

    widths: tuple[int, ...]
    alone: bool
    targets: Mapping[int, int] = field(default_factory=dict)
    max_seqlen: int | None = None


def cudnn_missing(device: torch.device, dtype: torch.dtype, *, head: int) -> str | None:
    """Why cuDNN's attention cannot run on this device with heads of this width; None when it can."""
    reason = fused_missing(device, dtype, capability=FUSED["cudnn"])
    if reason is None and (head % 8 or head > 128):
        return f"needs a head width that is a multiple of 8 and at most 128, not {head}"
    if reason is None and torch.are_deterministic_algorithms_enabled():
        return "has no deterministic backward pass (train.deterministic)"
    return reason


def check_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise RecipeError when the path `model.attention` asks for cannot run on this device in this dtype."""
    if wanted in FUSED:
        reason = fused_missing(device, dtype, capability=FUSED[wanted])
        if reason is not None:
            raise RecipeError(f"model.attention={wanted} {reason}. Use model.attention=auto.")


def check_needs(wanted: str, needs: AttentionNeeds) -> None:
    """Raise RecipeError when the path `model.attention` asks for cannot compute what the model does."""
    lacks = ""
    if needs.softcap and wanted not in ("auto", "sdpa"):
        lacks = "has no cap of attention scores, which this model has (attn_logit_softcapping)"
    elif needs.window and wanted in ("causal", "cudnn"):
        lacks = "has no sliding window; this model's is shorter than data.max_length"
    if lacks:
        raise RecipeError(f"model.attention={wanted} {lacks}. Use model.attention=auto.")


def choose_attention(
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    alone: bool,
    head: int,
    needs: AttentionNeeds = NO_NEEDS,
) -> tuple[str, str]:
    """`model.attention` -> (path, why). `alone`: every block holds one document; `head`: width of an attention head.

    Raises RecipeError like `check_attention` and `check_needs`, and for a path without boundaries where blocks hold
    several documents."""
    check_attention(wanted, device, dtype)
    check_needs(wanted, needs)
    if needs.softcap:
        return "capped", "scores are capped, which no fused kernel does"
    alone_and_whole = alone and not needs.window
    if wanted in ("causal", "cudnn") and not alone:
        raise RecipeError(
            f"model.attention={wanted} needs blocks of one document each; these hold several. "
            "Use model.attention=auto, or data.batching=bucketed."
        )
    no_cudnn = cudnn_missing(device, dtype, head=head)
    if wanted == "cudnn" and no_cudnn is not None:
        raise RecipeError(f"model.attention=cudnn {no_cudnn}. Use model.attention=auto.")
    if wanted != "auto":
        return wanted, "as asked"
    if alone_and_whole and no_cudnn is None and torch.cuda.get_device_capability(device)[0] == CUDNN_WINS:
        return "cudnn", "fastest here for blocks of one document"
    no_varlen = fused_missing(device, dtype, capability=FUSED["varlen"])
    if no_varlen is None:
        return "varlen", "fastest here"
    return (
        ("causal", "blocks of one document") if alone_and_whole else ("sdpa", f"variable-length attention {no_varlen}")
    )


def attention_name(path: str) -> str:
    """The name of the path in transformers' AttentionInterface."""
    return f"packed_{path}"


def register_attention(path: str, core: Core | None = None) -> None:
    """Register with transformers the path's core, or its compiled form `core`; it replaces what was registered."""
    attend_packed = core or CORES[path]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        assert kwargs.get("softcap") is None or path == "capped", "choose_attention leaves these no other path"
        assert attention_mask is not None or path not in MASKED, "PackedCausalLM passes the mask to these paths"
        window = () if (tokens := kwargs["window"]) is None else (tokens,)
        boundaries = {
            "sdpa": attention_mask,
            "capped": (attention_mask, kwargs.get("softcap")),
            "varlen": (kwargs["cu_seqlens"], kwargs["max_seqlen"], *window),
        }.get(path)
        return attend_packed(query, key, value, boundaries, kwargs["scaling"]), None

    AttentionInterface.register(attention_name(path), attend)
