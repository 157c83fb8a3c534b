import pytest
import torch

from launcher.ops.document_attention import (
    capped_attention,
    causal_attention,
    document_mask,
    fused_missing,
    masked_attention,
    packed_attention_reference,
    within_window,
)


def case(heads=4, kv=2):
    """Query, key, value and document ids of two blocks of 13 positions."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, count, 13, 8) for count in (heads, kv, kv))
    return q, k, v, torch.tensor([[0] * 5 + [1] * 1 + [2] * 7, [0] * 13])


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (4, 1)])
def test_masked_attention_equals_the_plain_form(heads, kv):
    q, k, v, documents = case(heads=heads, kv=kv)
    ours = masked_attention(q, k, v, document_mask(documents), 0.3)
    plain = packed_attention_reference(q, k, v, documents, 0.3)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_a_poisoned_document_changes_no_other():
    q, k, v, documents = case()
    before = masked_attention(q, k, v, document_mask(documents), 0.3)
    k[0, :, 5], v[0, :, 5] = 1e4, 1e4  # the one token of document 1 in block 0
    after = masked_attention(q, k, v, document_mask(documents), 0.3)
    changed = (before != after).any(dim=(2, 3))
    assert changed[0].tolist() == [position == 5 for position in range(13)]
    assert not changed[1].any()


def test_the_mask_lets_a_token_see_its_own_document_up_to_itself():
    mask = document_mask(torch.tensor([[0, 0, 1]]))[0, 0]
    assert mask.tolist() == [[True, False, False], [True, True, False], [False, False, True]]


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 1)])
def test_causal_attention_is_masked_attention_for_blocks_of_one_document(heads, kv):
    q, k, v, documents = case(heads=heads, kv=kv)
    alone = torch.zeros_like(documents)
    ours = causal_attention(q, k, v, None, 0.3)
    torch.testing.assert_close(ours, packed_attention_reference(q, k, v, alone, 0.3), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, packed_attention_reference(q, k, v, documents, 0.3))


def test_a_fused_kernel_says_why_it_cannot_run_here():
    assert "needs CUDA" in fused_missing(torch.device("cpu"), torch.bfloat16, capability=(8, 0))


def test_a_window_hides_what_lies_that_many_positions_back():
    mask = document_mask(torch.zeros(1, 4, dtype=torch.int32))
    visible = (mask & within_window(mask, 2))[0, 0].int().tolist()
    assert visible == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2)])
def test_capped_attention_is_masked_attention_without_a_cap_and_bounds_scores_with_one(heads, kv):
    q, k, v, documents = case(heads=heads, kv=kv)
    mask = torch.zeros(2, 1, 13, 13).masked_fill(~document_mask(documents), float("-inf"))
    torch.testing.assert_close(
        capped_attention(q, k, v, (mask, None), 0.3), masked_attention(q, k, v, mask, 0.3), rtol=1e-5, atol=1e-6
    )
    means = capped_attention(q, k, v, (mask, 1e-6), 0.3)[1]  # all scores equal: the mean of the values so far
    counts = torch.arange(1, 14)[:, None, None]
    repeated = v[1].repeat_interleave(heads // kv, dim=0).transpose(0, 1)
    torch.testing.assert_close(means, repeated.cumsum(0) / counts, rtol=1e-4, atol=1e-5)
