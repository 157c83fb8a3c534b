"""The operators of DoRA against one plain matrix for each projection, the lengths of its rows counted as constants."""

import pytest
import torch
import torch.nn.functional as F

from launcher.ops import dora_feed_forward
from launcher.ops.dora_feed_forward import dora_gated_feed_forward, plain_dora_swiglu_gradient
from launcher.ops.dora_linears import dora_linears, sum_of_products
from tests.support.quantised import adapters, quantised
from tests.support.tensors import assert_same_with_gradients, saved_for_backward

SIZES = {"linears": [(24, 40), (24, 8)], "feed forward": [(24, 40), (24, 40), (40, 24)]}  # in- and out-features
OURS = {"linears": dora_linears, "feed forward": dora_gated_feed_forward}


def parts(sizes, dtype):
    """Bases, their weights, and A, B and m of each projection, which require gradients."""
    torch.manual_seed(0)
    bases, weights = zip(*(quantised(*size, dtype=dtype) for size in sizes), strict=True)
    a, b = zip(*(adapters(*size, 3) for size in sizes), strict=True)
    m = [weight.float().norm(dim=1) * (0.5 + torch.rand(weight.shape[0])) for weight in weights]
    for tensor in (*a, *b, *m):
        tensor.requires_grad_()
    return bases, weights, [*a, *b, *m]


def plain(weight, a, b, m, x):
    merged = weight.float() + 0.5 * (b @ a)
    return F.linear(x.float(), merged * (m / merged.norm(dim=1).detach())[:, None])


def reference(form, weights, x, a, b, m):
    products = [lambda x, i=i: plain(weights[i], a[i], b[i], m[i], x) for i in range(len(weights))]
    if form == "linears":
        return torch.cat([product(x) for product in products], -1)
    gate, up, down = products
    return down(F.silu(gate(x)) * up(x))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("form", SIZES)
@pytest.mark.parametrize("compiled", [False, True])
def test_equals_plain_matrices_with_the_gradients_of_a_b_and_m(form, dtype, tolerance, compiled):
    sizes = SIZES[form]
    bases, weights, trained = parts(sizes, dtype)
    x = torch.linspace(-1, 1, 2 * 3 * sizes[0][0]).view(2, 3, -1).to(dtype)

    def thirds(tensors):
        n = len(sizes)
        return tensors[:n], tensors[n : 2 * n], tensors[2 * n :]

    assert_same_with_gradients(
        lambda x, *abm: OURS[form](x, bases, *thirds(abm), scaling=0.5),
        lambda x, *abm: reference(form, weights, x, *thirds(abm)),
        x, *trained, tolerance=tolerance, compiled=compiled,
    )  # fmt: skip


def test_the_plain_gradient_of_the_gate_is_autograds():
    torch.manual_seed(0)
    pair, dh, scale = torch.randn(5, 12, requires_grad=True), torch.randn(5, 6), torch.rand(12).requires_grad_()
    gate, up = (pair * scale).chunk(2, -1)
    h = F.silu(gate) * up
    h.backward(dh)
    gradient, sums, recomputed = plain_dora_swiglu_gradient(pair.detach(), dh, scale.detach())
    torch.testing.assert_close(gradient, pair.grad)
    torch.testing.assert_close(sums / scale.detach(), scale.grad)
    torch.testing.assert_close(recomputed, h.detach())


def test_compiled_the_feed_forward_module_keeps_its_input_and_two_products(monkeypatch):
    bases, _, trained = parts([(64, 128), (64, 128), (128, 64)], torch.float32)
    summed = []
    monkeypatch.setattr(
        dora_feed_forward, "sum_of_products", lambda p, q: summed.append(p.shape) or sum_of_products(p, q)
    )
    torch._dynamo.reset()
    form = torch.compile(
        lambda x: dora_gated_feed_forward(x, bases, trained[:3], trained[3:6], trained[6:], scaling=1.0) * 2,
        backend="aot_eager",
    )
    with saved_for_backward(but=[*(t for base in bases for t in base), *trained]) as sizes:
        form(torch.randn(100, 64, requires_grad=True))
    large = sorted(size for size in sizes.values() if size >= 100 * 64 * 4)
    assert large == [100 * 64 * 4, 100 * 64 * 4, 100 * 256 * 4]  # x, and z of down and of gate and up; not h
    assert summed == [(100, 64)]  # of down alone: one pass sums those of gate and up
