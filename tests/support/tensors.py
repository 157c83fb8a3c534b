"""Tensors measured and compared."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """The norm of the difference, relative to that of `exact`; computed in fp64."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def assert_same_with_gradients(
    ours: Callable[..., Any], plain: Callable[..., Any], *inputs: Tensor, tolerance: float, compiled: bool = False
) -> None:
    """Both functions of the inputs have the same outputs, a tensor or several, and the same gradients of all inputs.

    `ours` may be compiled before; `tolerance` is relative to the largest value of each tensor.
    """
    torch._dynamo.reset()
    form = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    for mine, theirs in zip(_with_gradients(form, inputs), _with_gradients(plain, inputs), strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item(), check_dtype=False
        )
        assert theirs.any()


def _with_gradients(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    sum((output.float().square() * weight).sum() for weight, output in enumerate(outputs, 1)).backward()
    return [*outputs, *(leaf.grad for leaf in leaves)]


def add_noise(parameters: Iterable[Tensor]) -> None:
    """Move parameters by noise from a seed, the same on every device."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) * 0.05)


@contextmanager
def saved_for_backward(*, but: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes, by address, of the storages that autograd saves inside, other than those of `but`."""
    excluded = {tensor.untyped_storage().data_ptr() for tensor in but}
    sizes: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        yield sizes
