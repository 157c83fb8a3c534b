"""One flat buffer under all gradients."""

import pytest
import torch
from torch import nn

from launcher.train.gradients import FlatGradients

SHAPES = [(3,), (5, 7), (1,), (4, 4)]


def made():
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    return parameters, FlatGradients(parameters)


def test_every_gradient_is_a_view_that_begins_at_sixteen_bytes():
    parameters, flat = made()
    [storage] = {p.grad.untyped_storage().data_ptr() for p in parameters}
    assert all((p.grad.data_ptr() - storage) % 16 == 0 for p in parameters)
    assert [tuple(p.grad.shape) for p in parameters] == SHAPES
    assert flat.loss_sum.untyped_storage().data_ptr() == storage
    flat.multiply(torch.ones(()))
    assert len({p.grad.data_ptr() for p in parameters}) == len(SHAPES)


def test_gradients_and_losses_add_up_and_their_norm_is_that_of_all():
    parameters, flat = made()
    drawn = [[torch.randn(shape) for shape in SHAPES] for _ in range(2)]
    for gradients in drawn:
        flat.add(gradients, torch.tensor(100.0))
    expected = [a + b for a, b in zip(*drawn, strict=True)]
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert float(flat.norm()) == pytest.approx(float(torch.cat([g.flatten() for g in expected]).norm()))
    assert float(flat.loss_sum) == 200
    flat.multiply(torch.tensor(2.0))
    assert torch.equal(parameters[1].grad, 2 * expected[1])
    assert float(flat.loss_sum) == 200
    parameters[2].grad.fill_(float("inf"))
    assert not torch.isfinite(flat.norm())
    flat.clear()
    assert float(flat.norm()) == float(flat.loss_sum) == 0
