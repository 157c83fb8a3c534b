"""The loss of one chunk where logits are capped, z = cap * tanh(h W^T / cap): what ops/linear_ce.py calls chunk by
chunk. In plain PyTorch, in fp32.

    dloss/dh = ((p - onehot(t)) * (1 - tanh^2)) W          p = softmax(z)

Letters: R rows of the chunk, D model width, V vocabulary.
"""

import torch
from torch import Tensor

from launcher.ops.linear_ce import ChunkFunctions, scaled_rows, softmax_gradient


def capped_chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor, cap: float) -> Tensor:
    """Summed loss. hidden [R, D], weight [V, D], labels [R] -> scalar, fp32."""
    return softmax_gradient(cap * torch.tanh((hidden @ weight.T).float() / cap), labels)[0]


def capped_chunk_loss_and_grad(hidden: Tensor, weight: Tensor, labels: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """`capped_chunk_loss` and its gradient with respect to hidden, as `linear_ce.chunk_loss_and_grad`."""
    capped = torch.tanh((hidden @ weight.T).float() / cap)
    loss, gradient = softmax_gradient(cap * capped, labels)
    rows, scales = scaled_rows(gradient * (1 - capped.square()), hidden.dtype)
    grad = rows @ weight
    return loss, grad.float() / scales[:, None] if hidden.dtype == torch.float16 else grad


def chunk_functions(cap: float | None) -> ChunkFunctions:
    """Those of a model whose logits have this cap; None: none."""
    if cap is None:
        return ChunkFunctions()

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return capped_chunk_loss(hidden, weight, labels, cap)

    def loss_and_grad(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return capped_chunk_loss_and_grad(hidden, weight, labels, cap)

    return ChunkFunctions(loss, loss_and_grad)
