"""Measures of tensors that several tests take."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """The norm of the difference, relative to that of `exact`; computed in fp64."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


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
