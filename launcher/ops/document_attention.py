"""Causal attention over packed blocks: a token sees the earlier tokens of its own document and nothing else.

Letters: B blocks, H query heads, K key-value heads (H is a multiple of K), S positions of a block, E head width.

Two forms for blocks of several documents. `masked_attention` takes an explicit [B, 1, S, S] mask: any device and dtype,
S * S bytes per block. `varlen_attention` takes the cumulative document lengths over the flattened B * S positions: no
mask and no work across documents, but only FlashAttention (CUDA, compute capability 8.0 or more, half precision).

Two forms for blocks of one document each, padded on the right, where a causal mask alone hides the padding from every
token: `causal_attention`, on any device, and `cudnn_attention`, a third faster than FlashAttention on an H200.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# In torch later than 2.11.
TAKES_GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def document_mask(document_ids: Tensor) -> Tensor:
    """document_ids [B, S] -> bool [B, 1, S, S], True where the query (dim 2) may see the key (dim 3)."""
    length = document_ids.shape[1]
    same = document_ids[:, :, None] == document_ids[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return (same & causal)[:, None]


def within_window(mask: Tensor, window: int) -> Tensor:
    """mask [B, 1, S, S] -> bool [S, S], False where the key is `window` or more positions before the query."""
    length = mask.shape[-1]
    return torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1 - window)


def fused_missing(device: torch.device, dtype: torch.dtype, *, capability: tuple[int, int]) -> str | None:
    """Why a half-precision kernel that needs this compute capability cannot run on `device`; None when it can."""
    if device.type != "cuda":
        return f"needs CUDA, the device is {device.type}"
    if torch.cuda.get_device_capability(device) < capability:
        return f"needs compute capability {capability[0]}.{capability[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """query [B, H, S, E], key and value [B, K, S, E], mask [B, 1, S, S], bool or added to the scores ->
    [B, S, H, E]."""
    # Expanded heads rather than enable_gqa: with a mask that flag leaves CUDA only the O(S * S) math kernel.
    groups = query.shape[1] // key.shape[1]
    key, value = _repeat_heads(key, groups), _repeat_heads(value, groups)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, limits: tuple[Tensor, float | None], scale: float
) -> Tensor:
    """As `masked_attention`, but scores z become cap * tanh(z / cap) before the mask [B, 1, S, S] is added to them.
    `limits`: mask and cap. No kernel does that: the [B, H, S, S] scores exist as a whole."""
    mask, cap = limits
    groups = query.shape[1] // key.shape[1]
    key, value = _repeat_heads(key, groups), _repeat_heads(value, groups)
    scores = query @ key.transpose(2, 3) * scale
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    weights = (scores + mask).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, boundaries: tuple[Any, ...], scale: float) -> Tensor:
    """query [B, H, S, E], key and value [B, K, S, E], boundaries (cu_seqlens int32 [documents + 1], upper bound on
    document length, and where there is one the window in tokens) -> [B, S, H, E]. Tokens of a document beyond that
    bound are silently ignored.

    `cu_seqlens` ends with repeats of B * S, documents without tokens, so that its size is static.
    """
    (cu_seqlens, max_seqlen, *windows), (blocks, heads, length, width) = boundaries, query.shape
    longest = min(length, max_seqlen)  # the kernels launch tiles for this many tokens of every document
    # [B, H, S, E] -> [B * S, H, E]
    q, k, v = (t.transpose(1, 2).reshape(blocks * length, -1, width) for t in (query, key, value))
    if heads > key.shape[1] and not TAKES_GROUPED_HEADS:
        flash = torch.ops.aten._flash_attention_forward  # takes grouped heads, which 2.11's public function does not
        sides = {"window_size_left": windows[0] - 1, "window_size_right": 0} if windows else {}
        out = flash(q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False, scale=scale, **sides)[0]
    else:
        options: dict[str, Any] = {"enable_gqa": True} if heads > key.shape[1] else {}
        window = (windows[0] - 1 if windows else -1, 0)  # -1 is unlimited; nothing to the right
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window, scale=scale, **options)
    assert isinstance(out, Tensor)  # a pair only where auxiliary outputs are requested
    return out.view(blocks, length, heads, width)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, boundaries: None, scale: float) -> Tensor:
    """As `masked_attention`, for blocks of one document each, which need no boundaries."""
    groups = query.shape[1] // key.shape[1]
    key, value = _repeat_heads(key, groups), _repeat_heads(value, groups)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2)


def cudnn_attention(query: Tensor, key: Tensor, value: Tensor, boundaries: None, scale: float) -> Tensor:
    """As `causal_attention`, with cuDNN's kernel, which takes grouped heads. CUDA and half precision only."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention  # by name: torch would choose another kernel
    out: Tensor = attend(query, key, value, None, True, 0.0, True, False, scale=scale)[0]
    return out.transpose(1, 2)


def packed_attention_reference(query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor, scale: float) -> Tensor:
    """The plain form: explicit scores, fp32 softmax. document_ids [B, S]; otherwise as `masked_attention`."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)).float() * scale
    scores = scores.masked_fill(~document_mask(document_ids), float("-inf"))
    return (scores.softmax(dim=-1).to(query.dtype) @ value).transpose(1, 2)


def _repeat_heads(states: Tensor, groups: int) -> Tensor:
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)
