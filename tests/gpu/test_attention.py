"""The fused attention kernels against the plain form."""

import pytest
import torch

from launcher.ops.document_attention import (
    causal_attention,
    cudnn_attention,
    document_mask,
    masked_attention,
    packed_attention_reference,
    varlen_attention,
    within_window,
)
from tests.support.tensors import relative_error
from tests.support.workers import compiled, documents

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16]


def outputs_and_gradients(form, inputs, *where):
    out = form(*inputs, *where)
    return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]


def drawn(rows, heads, kv, length, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(rows, heads, length, 64), (rows, kv, length, 64), (rows, kv, length, 64)]
    return [torch.randn(shape, generator=generator, device="cuda", dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_seqlen", [56, 64, 500])
@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (8, 1)])
def test_variable_length_and_masked_attention_equal_the_plain_form_with_gradients(heads, kv, dtype, max_seqlen):
    document_ids = torch.zeros(2, 96, dtype=torch.int32, device="cuda")
    document_ids[0, 40:41], document_ids[0, 41:], document_ids[1, 56:] = 1, 2, 1
    boundaries = torch.tensor([0, 40, 41, 96, 152, 192, 192], dtype=torch.int32, device="cuda")
    inputs = drawn(2, heads, kv, 96, dtype)
    plain = outputs_and_gradients(packed_attention_reference, inputs, document_ids, 0.1)
    for form, where in ((varlen_attention, (boundaries, max_seqlen)), (masked_attention, document_mask(document_ids))):
        for ours, exact in zip(outputs_and_gradients(form, inputs, where, 0.1), plain, strict=True):
            assert relative_error(ours, exact) < 1e-2
            assert exact.float().norm() > 0.1


@pytest.mark.parametrize("window", [2, 8, 39])
@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (8, 2)])
def test_a_window_of_variable_length_attention_is_that_of_the_mask(heads, kv, window):
    document_ids = torch.zeros(2, 96, dtype=torch.int32, device="cuda")
    document_ids[0, 40:], document_ids[1, 56:] = 1, 1
    boundaries = torch.tensor([0, 40, 96, 152, 192], dtype=torch.int32, device="cuda")
    inputs, whole = drawn(2, heads, kv, 96, torch.bfloat16), document_mask(document_ids)
    masked = outputs_and_gradients(masked_attention, inputs, whole & within_window(whole, window), 0.1)
    ours = outputs_and_gradients(varlen_attention, inputs, (boundaries, 56, window), 0.1)
    unlimited = outputs_and_gradients(varlen_attention, inputs, (boundaries, 56), 0.1)
    assert all(relative_error(mine, theirs) < 1e-2 for mine, theirs in zip(ours, masked, strict=True))
    assert relative_error(unlimited[0], masked[0]) > 0.03


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv", "length"), [(4, 4, 96), (8, 2, 100), (32, 8, 512)])
def test_cudnn_attention_is_causal_attention_with_its_gradients(heads, kv, length, dtype):
    inputs = drawn(2, heads, kv, length, dtype)
    ours, plain = (outputs_and_gradients(form, inputs, None, 0.125) for form in (cudnn_attention, causal_attention))
    for mine, theirs in zip(ours, plain, strict=True):
        assert relative_error(mine, theirs) < 1e-2
        assert theirs.float().norm() > 0.1


@pytest.mark.usefixtures("clean_dynamo")
def test_the_sample_may_be_longer_than_any_document_of_the_run(recipe_of):
    ids, logits = torch.arange(300, device="cuda")[None], []
    for attention in ("varlen", "sdpa"):
        recipe = recipe_of(model={"attention": attention}, data={"max_length": 512}, compile={"mode": "off"})
        packed = compiled(recipe, documents((60, 100)), device="cuda").built.packed
        assert packed.max_seqlen == 128
        logits.append(packed.next_logits(ids))
    assert relative_error(*logits) < 2e-2
