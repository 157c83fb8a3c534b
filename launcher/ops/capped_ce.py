"""The loss of one chunk where logits are capped, z = cap * tanh(h W^T / cap): what ops/linear_ce.py calls chunk by
chunk. In plain PyTorch, in fp32.

    dloss/dh = ((p - onehot(t)) * (1 - tanh^2)) W          p = softmax(z)

Letters: R rows of the chunk, D model width, V vocabulary.
"""

import torch
from torch import Tensor

from launcher.ops.linear_ce import (
    ChunkFunctions,
    scaled_rows,
    softmax_gradient,
    trained_gradient,
    unscaled_product,
)


def capped_chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor, cap: float) -> Tensor:
    """Summed loss. hidden [R, D], weight [V, D], labels [R] -> scalar, fp32."""
    return softmax_gradient(cap * torch.tanh((hidden @ weight.T).float() / cap), labels)[0]


def capped_chunk_loss_and_grad(hidden: Tensor, weight: Tensor, labels: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """`capped_chunk_loss` and its gradient with respect to hidden, as `linear_ce.chunk_loss_and_grad`."""
    loss, rows, scales = _loss_and_scaled_rows(hidden, weight, labels, cap)
    return loss, unscaled_product(rows, weight, scales)


def capped_chunk_loss_and_grads(
    hidden: Tensor, weight: Tensor, labels: Tensor, trained: Tensor, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`capped_chunk_loss_and_grad`, and the gradient of rows of weight, as `linear_ce.chunk_loss_and_grads`."""
    loss, rows, scales = _loss_and_scaled_rows(hidden, weight, labels, cap)
    return loss, unscaled_product(rows, weight, scales), trained_gradient(rows, scales, trained, hidden)


def _loss_and_scaled_rows(hidden: Tensor, weight: Tensor, labels: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    capped = torch.tanh((hidden @ weight.T).float() / cap)
    loss, gradient = softmax_gradient(cap * capped, labels)
    return loss, *scaled_rows(gradient * (1 - capped.square()), hidden.dtype)


def chunk_functions(cap: float | None) -> ChunkFunctions:
    """Those of a model whose logits have this cap; None: none."""
    if cap is None:
        return ChunkFunctions()

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return capped_chunk_loss(hidden, weight, labels, cap)

    def loss_and_grad(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return capped_chunk_loss_and_grad(hidden, weight, labels, cap)

    def loss_and_grads(
        hidden: Tensor, weight: Tensor, labels: Tensor, trained: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return capped_chunk_loss_and_grads(hidden, weight, labels, trained, cap)

    return ChunkFunctions(loss, loss_and_grad, loss_and_grads)
