"""Causal attention over packed rows: a token sees the earlier tokens of its own document and nothing else.

Letters: B rows, H query heads, K key-value heads (H is a multiple of K), S positions of a row, E head width.

Two forms for rows of several documents. `masked_attention` takes an explicit [B, 1, S, S] mask: any device, any dtype,
S * S bytes a row. `varlen_attention` takes the cumulative document lengths over the flattened B * S positions: no mask,
no work across documents, but FlashAttention only (CUDA, compute capability 8.0 or more, half precision).

Two for rows of one document each, padded on the right, where a causal mask alone hides the padding from every token:
`causal_attention`, on any device, and `cudnn_attention`, on an H200 a third faster than FlashAttention.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# Later than torch 2.11.
TAKES_GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def document_mask(document_ids: Tensor) -> Tensor:
    """document_ids [B, S] -> bool [B, 1, S, S], True where the query (dim 2) may see the key (dim 3)."""
    length = document_ids.shape[1]
    same = document_ids[:, :, None] == document_ids[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return (same & causal)[:, None]


def fused_missing(device: torch.device, dtype: torch.dtype, *, capability: tuple[int, int]) -> str | None:
    """Why a kernel for half precision and this compute capability cannot run here; None when it can."""
    if device.type != "cuda":
        return f"needs CUDA, the device is {device.type}"
    if torch.cuda.get_device_capability(device) < capability:
        return f"needs compute capability {capability[0]}.{capability[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """query [B, H, S, E], key and value [B, K, S, E], mask bool [B, 1, S, S] -> [B, S, H, E]."""
    # Expanded heads rather than enable_gqa: with a mask that flag leaves CUDA only the O(S * S) math kernel.
    groups = query.shape[1] // key.shape[1]
    key, value = _repeat_heads(key, groups), _repeat_heads(value, groups)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, boundaries: tuple[Tensor, int], scale: float) -> Tensor:
    """query [B, H, S, E], key and value [B, K, S, E], boundaries (cu_seqlens int32 [documents + 1], the most tokens
    that one of them has) -> [B, S, H, E]. What lies beyond that many tokens of a document is left out unsaid.

    Trailing repeats of B * S in `cu_seqlens` are documents of no tokens: the tensor's size is static.
    """
    (cu_seqlens, max_seqlen), (rows, heads, length, width) = boundaries, query.shape
    most = min(length, max_seqlen)  # the kernels' grids have blocks for as much of every document
    # [B, H, S, E] -> [B * S, H, E]
    q, k, v = (t.transpose(1, 2).reshape(rows * length, -1, width) for t in (query, key, value))
    if heads > key.shape[1] and not TAKES_GROUPED_HEADS:
        flash = torch.ops.aten._flash_attention_forward  # it takes grouped heads; 2.11's public form does not let it
        out = flash(q, k, v, cu_seqlens, cu_seqlens, most, most, 0.0, True, False, scale=scale)[0]
    else:
        options: dict[str, Any] = {"enable_gqa": True} if heads > key.shape[1] else {}
        window = (-1, 0)  # unlimited to the left, nothing to the right
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, most, most, window_size=window, scale=scale, **options)
    assert isinstance(out, Tensor)  # a pair only where auxiliary outputs are asked for
    return out.view(rows, length, heads, width)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, boundaries: None, scale: float) -> Tensor:
    """As `masked_attention` where every row is one document, so that there is no boundary to know."""
    groups = query.shape[1] // key.shape[1]
    key, value = _repeat_heads(key, groups), _repeat_heads(value, groups)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2)


def cudnn_attention(query: Tensor, key: Tensor, value: Tensor, boundaries: None, scale: float) -> Tensor:
    """`causal_attention` by cuDNN, which takes grouped heads: CUDA and half precision only."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention  # by name: torch's own choice is another kernel
    out: Tensor = attend(query, key, value, None, True, 0.0, True, False, scale=scale)[0]
    return out.transpose(1, 2)


def packed_attention_reference(query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor, scale: float) -> Tensor:
    """The plain form: explicit scores, fp32 softmax. document_ids [B, S]; the rest as `masked_attention`."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)).float() * scale
    scores = scores.masked_fill(~document_mask(document_ids), float("-inf"))
    return (scores.softmax(dim=-1).to(query.dtype) @ value).transpose(1, 2)


def _repeat_heads(states: Tensor, groups: int) -> Tensor:
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)
