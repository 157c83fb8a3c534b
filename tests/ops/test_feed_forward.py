import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from launcher.ops.feed_forward import gated_feed_forward, gated_feed_forward_reference, plain_swiglu_gradient
from tests.support.quantised import adapters, quantised
from tests.support.tensors import assert_same_with_gradients, saved_for_backward

SHAPES = [(8, 8, 1), (24, 40, 3), (64, 128, 16)]  # D, F, r


def feed_forward(features, width, rank, *, dtype=torch.float32):
    """Bases, their weights, A and B of gate, up and down."""
    torch.manual_seed(0)
    sizes = [(features, width), (features, width), (width, features)]
    bases, weights = zip(*(quantised(*size, dtype=dtype) for size in sizes), strict=True)
    a, b = zip(*(adapters(*size, rank) for size in sizes), strict=True)
    for matrix in (*a, *b):
        matrix.requires_grad_()
    return bases, weights, a, b


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize(("features", "width", "rank"), SHAPES)
@pytest.mark.parametrize("compiled", [False, True])
def test_equals_three_merged_matrices_with_gradients_in_the_fp32_masters(
    features, width, rank, dtype, tolerance, compiled
):
    bases, weights, a, b = feed_forward(features, width, rank, dtype=dtype)
    x = torch.linspace(-1, 1, 2 * 3 * features).view(2, 3, features).to(dtype)
    assert_same_with_gradients(
        lambda x, *ab: gated_feed_forward(x, bases, ab[:3], ab[3:], scaling=0.5),
        lambda x, *ab: gated_feed_forward_reference(x, weights, ab[:3], ab[3:], scaling=0.5),
        x, *a, *b, tolerance=tolerance, compiled=compiled,
    )  # fmt: skip


def test_the_plain_gradient_of_the_gate_is_autograds():
    torch.manual_seed(0)
    pair, dh = torch.randn(5, 12, dtype=torch.float64).float().requires_grad_(), torch.randn(5, 6)
    gate, up = pair.chunk(2, -1)
    h = F.silu(gate) * up
    h.backward(dh)
    gradient, recomputed = plain_swiglu_gradient(pair.detach(), dh)
    torch.testing.assert_close(gradient, pair.grad)
    torch.testing.assert_close(recomputed, h.detach())


def test_compiled_it_keeps_only_its_input_and_the_pair_of_gate_and_up():
    bases, _, a, b = feed_forward(64, 128, 4)
    torch._dynamo.reset()
    form = torch.compile(lambda x: gated_feed_forward(x, bases, a, b, scaling=1.0) * 2, backend="aot_eager")
    with saved_for_backward(but=[*(t for base in bases for t in base), *a, *b]) as sizes:
        form(torch.randn(100, 64, requires_grad=True))
    assert sorted(sizes.values()) == [100 * 64 * 4, 100 * 256 * 4]


def test_the_operators_count_their_products():
    bases, _, a, b = feed_forward(64, 32, 4)
    x = torch.randn(5, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        gated_feed_forward(x, bases, a, b, scaling=1.0).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 5 * 64 * 32)  # y and dx of three projections
