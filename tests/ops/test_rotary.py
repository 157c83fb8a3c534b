import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from launcher.ops.rotary import rotary
from tests.support.tensors import assert_same_with_gradients

HEADS = [(4, 2, 8), (3, 1, 6), (2, 2, 16)]  # H, K, E


def drawn(heads, kv, width, dtype=torch.float32):
    torch.manual_seed(0)
    y = torch.randn(2, 5, (heads + 2 * kv) * width).to(dtype)
    angles = torch.randn(2, 5, width)  # the halves differ: nothing relies on equal ones
    return y, angles.cos().to(dtype), angles.sin().to(dtype)


def stock(y, cos, sin, *, heads):
    """transformers' own function, on views of the parts."""
    parts = y.unflatten(-1, (-1, cos.shape[-1])).split([heads[0], heads[1], heads[1]], 2)
    query, key = apply_rotary_pos_emb(parts[0].transpose(1, 2), parts[1].transpose(1, 2), cos, sin)
    return query.transpose(1, 2), key.transpose(1, 2), parts[2]


@pytest.mark.parametrize(("heads", "kv", "width"), HEADS)
@pytest.mark.parametrize("compiled", [False, True])
def test_rotates_as_transformers_does_with_its_gradient(heads, kv, width, compiled):
    y, cos, sin = drawn(heads, kv, width)
    ours, theirs = (lambda x, form=form: form(x, cos, sin, heads=(heads, kv)) for form in (rotary, stock))
    assert_same_with_gradients(ours, theirs, y, tolerance=1e-6, compiled=compiled)


def test_half_precision_is_rounded_once():
    y, cos, sin = drawn(4, 2, 8, torch.bfloat16)
    exact = stock(*(t.double() for t in (y, cos, sin)), heads=(4, 2))
    for ours, theirs, true in zip(
        rotary(y, cos, sin, heads=(4, 2)), stock(y, cos, sin, heads=(4, 2)), exact, strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - true).norm() <= (theirs.double() - true).norm()


def test_value_does_not_keep_the_joined_projections():
    y, cos, sin = drawn(4, 2, 8)
    value = rotary(y, cos, sin, heads=(4, 2))[2]
    assert value.untyped_storage().nbytes() == value.numel() * 4


def test_one_table_serves_all_blocks():
    y, cos, sin = drawn(4, 2, 8)
    shared = rotary(y, cos[:1], sin[:1], heads=(4, 2))
    for number in range(len(y)):
        for ours, alone in zip(shared, rotary(y[number : number + 1], cos[:1], sin[:1], heads=(4, 2)), strict=True):
            assert torch.equal(ours[number : number + 1], alone) and alone.any()
