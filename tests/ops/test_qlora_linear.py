import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launcher.ops.nf4 import merged_weights
from launcher.ops.qlora_linear import frozen_linear, joined_linears, qlora_linear, qlora_linear_reference
from tests.support.quantised import adapters, quantised
from tests.support.tensors import assert_same_with_gradients, saved_for_backward

SHAPES = [(8, 8, 1), (24, 40, 3), (64, 128, 16), (192, 64, 5)]  # D, O, r; in two, scales cross rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("features", "out", "rank"), SHAPES)
def test_without_an_update_the_weight_is_bit_for_bit_that_of_bitsandbytes(features, out, rank, double, dtype):
    torch.manual_seed(0)
    base, weight = quantised(features, out, double=double, dtype=dtype)

    def merged(*update):
        return merged_weights([base], *update, scaling=1.0, outs=[out], out=torch.empty_like(weight))

    assert torch.equal(merged([], []), weight)
    a, b = adapters(features, out, rank)
    assert not torch.equal(merged([a], [b]), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_and_the_scaled_b_are_rounded_as_the_kernel_rounds_them(dtype):
    torch.manual_seed(0)
    base, weight = quantised(64, 128, dtype=torch.float32)
    a, b = adapters(64, 128, 16)
    ours = merged_weights([base], [a], [b], scaling=0.3, outs=[128], out=torch.empty(128, 64, dtype=dtype))
    rounded = weight + (0.3 * b).to(dtype).float() @ a.to(dtype).float()
    assert torch.equal(ours, rounded.to(dtype))
    assert not torch.equal(ours, (weight + 0.3 * (b @ a)).to(dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("features", "out", "rank"), SHAPES)
@pytest.mark.parametrize("compiled", [False, True])
def test_equals_one_merged_matrix_with_gradients_in_the_fp32_masters(features, out, rank, dtype, tolerance, compiled):
    torch.manual_seed(0)
    base, weight = quantised(features, out, dtype=dtype)
    x = torch.linspace(-1, 1, 2 * 3 * features).view(2, 3, features).to(dtype)
    assert_same_with_gradients(
        lambda x, a, b: qlora_linear(x, base, a, b, scaling=0.5, dropout=0.0),
        lambda x, a, b: qlora_linear_reference(x, weight, a, b, scaling=0.5),
        x, *adapters(features, out, rank), tolerance=tolerance, compiled=compiled,
    )  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
def test_projections_of_one_input_in_one_operator_give_what_each_gives_alone(compiled):
    torch.manual_seed(0)
    outs, x = (64, 32, 32), torch.randn(2, 5, 128)
    bases = [quantised(128, out)[0] for out in outs]
    a, b = zip(*(adapters(128, out, 4) for out in outs), strict=True)

    def together(x, *ab):
        return joined_linears(x, bases, ab[:3], ab[3:], scaling=0.5).split(outs, -1)

    def alone(x, *ab):
        return [qlora_linear(x, *one, scaling=0.5, dropout=0.0) for one in zip(bases, ab[:3], ab[3:], strict=True)]

    assert_same_with_gradients(together, alone, x, *a, *b, tolerance=1e-5, compiled=compiled)


def test_the_base_alone_is_a_product_with_an_input_gradient():
    torch.manual_seed(0)
    base, weight = quantised(64, 32)
    x = torch.randn(5, 64, requires_grad=True)
    frozen_linear(x, base, out_features=32).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 64))


def test_dropout_acts_only_where_gradients_are_recorded():
    torch.manual_seed(0)
    base, _ = quantised(64, 32)
    (a, b), x = adapters(64, 32, 4), torch.randn(2, 64)
    exact = qlora_linear(x, base, a, b, scaling=1.0, dropout=0.0)
    with torch.no_grad():
        assert torch.equal(qlora_linear(x, base, a, b, scaling=1.0, dropout=0.5), exact)
    dropped = torch.stack([qlora_linear(x, base, a, b, scaling=1.0, dropout=0.5) for _ in range(2000)])
    assert not torch.allclose(dropped[0], exact)
    torch.testing.assert_close(dropped.mean(0), exact, rtol=0.1, atol=0.1)


def test_a_compiled_layer_keeps_its_input_and_no_weight_for_the_backward_pass():
    torch.manual_seed(0)
    base, _ = quantised(256, 512)
    a, b = (t.requires_grad_() for t in adapters(256, 512, 4))
    torch._dynamo.reset()
    form = torch.compile(lambda x: qlora_linear(x, base, a, b, scaling=1.0, dropout=0.0).relu(), backend="aot_eager")
    x = torch.randn(8, 256, requires_grad=True)
    with saved_for_backward(but=[*base, a, b]) as sizes:
        form(x)
    assert 0 < sum(sizes.values()) < 256 * 512 * 2  # the weight would be 512 KiB in fp32, 256 in half precision


def test_the_operators_count_their_products():
    base, _ = quantised(64, 32)
    a, b = (t.requires_grad_() for t in adapters(64, 32, 4))
    x = torch.randn(5, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        qlora_linear(x, base, a, b, scaling=1.0, dropout=0.0).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 5 * 64 * 32)  # y and dx
