"""The Triton kernels against the plain forms beside them, odd shapes included."""

import pytest
import torch

from launcher.data.pack.micro_batch import IGNORE
from launcher.ops import adapter_gradients, nf4
from launcher.ops.adapter_gradients import gradients, plain_gradients
from launcher.ops.dora_feed_forward import dora_swiglu_gradient_, plain_dora_swiglu_gradient
from launcher.ops.dora_linears import sum_of_products
from launcher.ops.feed_forward import plain_swiglu_gradient, swiglu_gradient_
from launcher.ops.linear_ce import softmax_gradient, softmax_gradient_
from launcher.ops.nf4 import merged_weights, plain_merged_weight
from launcher.ops.rotary import plain_rotary, plain_rotary_gradient, rotary_gradient
from tests.support.quantised import quantised
from tests.support.tensors import relative_error

pytestmark = pytest.mark.gpu
CASES = [  # O, D, r, dtype, doubly quantised
    (2048, 2048, 16, torch.bfloat16, True),
    (512, 2048, 16, torch.float16, True),
    (8192, 2048, 32, torch.bfloat16, False),
    (2048, 8192, 16, torch.bfloat16, True),
    (96, 192, 3, torch.float32, True),
    (200, 64, 100, torch.bfloat16, True),
    (40, 24, 4, torch.bfloat16, True),  # a block of scales lies in two rows: not for the kernel
]
GRADIENT_CASES = [
    *((*case[:4], tokens) for case in CASES for tokens in (333, 4096)),
    (8192, 4096, 64, torch.bfloat16, 24),  # few tokens and wide adapters: the sums are zeroed in pieces
]
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Launched:
    """A kernel that records the shared memory of its launches."""

    def __init__(self, kernel):
        self.kernel, self.shared = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.shared.append(self.kernel[grid](*args, **kwargs).metadata.shared)

        return launch


def merged(bases, a, b, outs, dtype, *, scaling=2.0):
    features = 2 * bases[0].packed.numel() // outs[0]
    out = torch.empty(sum(outs), features, dtype=dtype, device="cuda")
    return merged_weights(bases, a, b, scaling=scaling, outs=outs, out=out)


@pytest.mark.parametrize(("out", "features", "rank", "dtype", "double"), CASES)
def test_one_launch_dequantises_bit_for_bit_as_bitsandbytes_and_adds_the_update(out, features, rank, dtype, double):
    torch.manual_seed(0)
    base, weight = quantised(features, out, double=double, dtype=dtype, device="cuda")
    assert torch.equal(merged([base], [], [], [out], dtype), weight)
    a, b = torch.randn(rank, features, device="cuda") * 0.1, torch.randn(out, rank, device="cuda") * 0.1
    true = plain_merged_weight(base, a, b, 2.0, weight.shape)
    ours = merged([base], [a], [b], [out], dtype)
    assert relative_error(ours, true) < ROUNDING[dtype]
    if dtype != torch.float32:  # the plain form in a dtype rounds what the kernel rounds
        rounded = plain_merged_weight(base, a, b, 2.0, weight.shape, dtype).to(dtype)
        assert relative_error(ours, rounded) < ROUNDING[dtype] / 4
    assert relative_error(weight, true) > 10 * ROUNDING[dtype]


@pytest.mark.parametrize(("double", "rank"), [(True, 16), (False, 70)])
@pytest.mark.parametrize(
    ("outs", "launches"), [((2048, 512, 512), 1), ((192, 40), 1), ((40, 192), 2), ((64, 64, 64, 64), 4)]
)
def test_one_launch_for_several_weights_gives_what_each_gives_alone(monkeypatch, outs, launches, rank, double):
    kernel = Launched(nf4.merge_kernel)
    monkeypatch.setattr(nf4, "merge_kernel", kernel)
    torch.manual_seed(0)
    bases = [quantised(256, out, double=double, dtype=torch.bfloat16, device="cuda")[0] for out in outs]
    a = [torch.randn(rank, 256, device="cuda") for _ in outs]
    b = [torch.randn(out, rank, device="cuda") * 0.01 for out in outs]
    together = merged(bases, a, b, outs, torch.bfloat16)
    assert len(kernel.shared) == launches
    alone = [merged([base], [p], [q], [out], torch.bfloat16) for base, p, q, out in zip(bases, a, b, outs, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert len({float(weight.float().std()) for weight in alone}) == len(outs)


@pytest.mark.parametrize(("out", "features", "rank", "dtype", "tokens"), GRADIENT_CASES)
def test_adapter_gradients_are_the_plain_ones(out, features, rank, dtype, tokens):
    torch.manual_seed(0)
    x, dy = (torch.randn(tokens, n, device="cuda").to(dtype) for n in (features, out))
    a, b = torch.randn(rank, features, device="cuda"), torch.randn(out, rank, device="cuda")
    ours, plain = gradients(dy, x, [a], [b], 2.0), plain_gradients(dy, x, a, b, 2.0)
    wide_x, wide_dy = x.double(), dy.double()
    true = (2 * (wide_dy @ b.double()).T @ wide_x, 2 * wide_dy.T @ (wide_x @ a.double().T))
    for mine, theirs, exact in zip(ours, plain, true, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == theirs.shape
        assert relative_error(mine, exact) < max(1.2 * relative_error(theirs, exact), ROUNDING[dtype])
        assert exact.norm() > 1


@pytest.mark.parametrize(
    ("outs", "rank"), [((2048, 512, 512), 16), ((8192, 8192), 16), ((96, 40), 32), ((64, 64, 64), 40)]
)
def test_projections_of_one_input_have_the_gradients_that_each_has_alone(outs, rank):
    torch.manual_seed(0)
    x, dtype = torch.randn(300, 256, device="cuda").bfloat16(), torch.bfloat16
    dy = [torch.randn(300, out, device="cuda").to(dtype) for out in outs]
    a = [torch.randn(rank, 256, device="cuda") for _ in outs]
    b = [torch.randn(out, rank, device="cuda") for out in outs]
    together = gradients(torch.cat(dy, 1), x, a, b, 0.5)
    alone = zip(*(plain_gradients(*one, 0.5) for one in zip(dy, [x] * len(outs), a, b, strict=True)), strict=True)
    for ours, theirs in zip(together, map(torch.cat, alone), strict=True):
        assert ours.shape == theirs.shape and relative_error(ours, theirs) < ROUNDING[dtype]


@pytest.mark.parametrize(("tokens", "width"), [(300, 8192), (7, 24), (64, 1030)])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_the_gates_gradient_is_the_plain_one(tokens, width, dtype):
    torch.manual_seed(0)
    pair, dh = (torch.randn(2, tokens, n, device="cuda").to(dtype) for n in (2 * width, width))
    plain = plain_swiglu_gradient(pair.double(), dh.double())
    for ours, true in zip((swiglu_gradient_(pair, dh), dh), plain, strict=True):
        assert ours.shape == true.shape and ours.dtype == dtype
        assert relative_error(ours, true) < ROUNDING[dtype]


@pytest.mark.parametrize(("heads", "kv", "width"), [(32, 8, 64), (3, 1, 6), (28, 4, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_rotary_kernel_is_the_plain_form_both_ways(heads, kv, width, dtype):
    torch.manual_seed(0)
    y = torch.randn(2, 77, (heads + 2 * kv) * width, device="cuda").to(dtype)
    cos, sin = torch.randn(2, 77, width, 2, device="cuda").to(dtype).unbind(-1)
    parts = torch.ops.qlora.rotary(y, cos, sin, heads, kv)
    for ours, plain in zip(parts, plain_rotary(y, cos, sin, heads=(heads, kv)), strict=True):
        assert ours.shape == plain.shape and relative_error(ours, plain) < ROUNDING[dtype]
    views = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]  # as an attention may give them
    assert relative_error(rotary_gradient(*views, cos, sin), plain_rotary_gradient(*parts, cos, sin)) < ROUNDING[dtype]


@pytest.mark.parametrize("tokens", [512, 16384])
@pytest.mark.parametrize("rank", [16, 32, 128])
@pytest.mark.parametrize("memory", [64 * 1024, 99 * 1024])
def test_the_kernels_fit_the_shared_memory_of_smaller_gpus(monkeypatch, memory, rank, tokens):
    kernels = [Launched(adapter_gradients.thin_kernel), Launched(adapter_gradients.tall_kernel)]
    monkeypatch.setattr(adapter_gradients, "shared_memory", lambda x: memory)
    monkeypatch.setattr(adapter_gradients, "thin_kernel", kernels[0])
    monkeypatch.setattr(adapter_gradients, "tall_kernel", kernels[1])
    x, dy = (torch.randn(tokens, n, device="cuda").bfloat16() for n in (2048, 8192))
    a, b = torch.randn(rank, 2048, device="cuda"), torch.randn(8192, rank, device="cuda")
    for ours, theirs in zip(gradients(dy, x, [a], [b], 1.0), plain_gradients(dy, x, a, b, 1.0), strict=True):
        assert relative_error(ours, theirs) < ROUNDING[torch.bfloat16]
    assert [len(kernel.shared) for kernel in kernels] == [1, 2]
    assert all(0 < used <= memory for kernel in kernels for used in kernel.shared)


@pytest.mark.parametrize(("rows", "vocabulary"), [(7, 1000), (64, 128256), (33, 5000), (5, 4096)])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_the_gradient_that_overwrites_the_logits_is_the_plain_one(rows, vocabulary, dtype):
    torch.manual_seed(0)
    logits = (torch.randn(rows, vocabulary, device="cuda") * 4).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), device="cuda")
    labels[::3] = IGNORE
    loss, plain = softmax_gradient(logits, labels)
    losses, scales = softmax_gradient_(logits, labels)
    assert losses.sum().item() == pytest.approx(loss.item(), rel=1e-5)
    unscaled = logits.float() / scales[:, None] if dtype == torch.float16 else logits
    assert relative_error(unscaled, plain) < ROUNDING[dtype]
    assert not logits[::3].any() and not losses[::3].any() and logits[1].any()


def test_a_logit_that_is_not_finite_makes_its_rows_loss_nan():
    logits = torch.ones(3, 5000, device="cuda", dtype=torch.bfloat16)
    logits[0, 4999], logits[1, 3] = float("nan"), float("inf")
    losses, _ = softmax_gradient_(logits, torch.ones(3, dtype=torch.int64, device="cuda"))
    assert losses.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize(("rows", "columns", "dtype"), [(4096, 3072, torch.bfloat16), (333, 200, torch.float16)])
def test_products_are_summed_over_the_rows_in_one_order(rows, columns, dtype):
    p, q = (torch.randn(rows, columns, device="cuda", dtype=dtype) for _ in range(2))
    ours = sum_of_products(p, q)
    assert relative_error(ours, (p.double() * q.double()).sum(0)) < 1e-5
    assert torch.equal(ours, sum_of_products(p, q))
    assert relative_error(ours, (p[1:].double() * q[1:].double()).sum(0)) > 1e-3


@pytest.mark.parametrize(("rows", "width", "dtype"), [(4096, 8192, torch.bfloat16), (333, 200, torch.float16)])
def test_the_gate_under_dora_has_its_gradient_its_sums_and_its_product(rows, width, dtype):
    torch.manual_seed(0)
    pair, dh = (torch.randn(rows, n, device="cuda", dtype=dtype) for n in (2 * width, width))
    scale = 0.5 + torch.rand(2 * width, device="cuda")
    true = plain_dora_swiglu_gradient(pair, dh, scale)
    again = dh.clone()
    gradient, sums = dora_swiglu_gradient_(pair, dh, scale)
    for ours, exact in zip((gradient, sums, dh), true, strict=True):
        assert relative_error(ours, exact) < 1e-2 * (1 if exact.dtype == dtype else 1e-3)
    assert torch.equal(sums, dora_swiglu_gradient_(pair, again, scale)[1])
