"""NEFTune (arXiv:2310.05914): uniform noise on the embeddings of training.

Each of the L x D numbers of a document is drawn from (-alpha / sqrt(L D), alpha / sqrt(L D)). L counts the tokens of
that document, not of the block that it shares, so that packing does not change how much noise it gets.
"""

import torch
from torch import Tensor


def embedding_noise(embedded: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
    """embedded [B, S, D], cu_seqlens [documents + 1], which cover all B * S positions -> noise [B, S, D]."""
    batch, length, width = embedded.shape
    position = torch.arange(batch * length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    document = torch.bucketize(position, cu_seqlens[1:], right=True)
    bound = alpha / (cu_seqlens.diff()[document] * float(width)).sqrt()
    unit = torch.rand(embedded.shape, device=embedded.device) * 2 - 1
    return (unit * bound.view(batch, length, 1)).to(embedded.dtype)
