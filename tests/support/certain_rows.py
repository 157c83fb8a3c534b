"""Rows of the loss whose target has nearly all of the probability, and what their gradient must be."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from launcher.ops.linear_ce import ChunkFunctions, linear_cross_entropy
from tests.support.tensors import relative_error

VOCABULARY, WIDTH = 50_000, 64
PROBABILITIES = (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def certain_rows() -> tuple[Tensor, Tensor, Tensor]:
    """hidden [6, D], weight [V, D] and labels [6] whose targets have PROBABILITIES; fp64. The weights share a
    direction, so that the gradients of the other logits do not cancel."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5 + 0.3
    labels = 7 * torch.arange(len(PROBABILITIES))
    direction = weight[labels] - weight.mean(0)
    low, high = torch.zeros(len(labels), 1).double(), torch.full((len(labels), 1), 100.0).double()
    for _ in range(50):
        middle = (low + high) / 2
        p = (middle * direction @ weight.T).softmax(1).gather(1, labels[:, None])
        above = p > torch.tensor(PROBABILITIES)[:, None]
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return high * direction, weight, labels


def check_certain_rows(device: str, dtype: torch.dtype) -> None:
    """Assert that each row's gradient is that of fp64 arithmetic on the same logits."""
    hidden, weight, labels = certain_rows()
    hidden, weight, labels = hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype), labels.to(device)
    (256 * linear_cross_entropy(hidden, weight, labels, chunk=4, functions=ChunkFunctions())).backward()
    assert hidden.grad is not None
    p = (hidden.detach() @ weight.T).double().softmax(1)
    exact = 256 * (p - one_hot(labels, VOCABULARY)) @ weight.double()
    errors = [relative_error(ours, true) for ours, true in zip(hidden.grad, exact, strict=True)]
    assert max(errors) < TOLERANCE[dtype], errors
    target_alone = 256 * (p.gather(1, labels[:, None]) - 1) * weight[labels].double()
    assert min(relative_error(one, true) for one, true in zip(target_alone, exact, strict=True)) > 0.1
