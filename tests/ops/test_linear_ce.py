import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.ops.linear_ce import (
    IGNORE,
    ChunkFunctions,
    chunk_rows,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def case(rows, width, vocabulary, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = IGNORE
    return hidden, weight, labels


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "chunk"), [(1, 8, 5, 1), (7, 16, 33, 3), (64, 24, 130, 64), (50, 8, 11, 16)]
)
def test_loss_and_gradient_equal_the_plain_form(rows, width, vocabulary, chunk, dtype):
    hidden, weight, labels = case(rows, width, vocabulary, dtype)
    ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = linear_cross_entropy(ours, weight, labels, chunk=chunk, functions=ChunkFunctions())
    reference = linear_cross_entropy_reference(plain, weight, labels)
    (loss * 3).backward()
    (reference * 3).backward()
    torch.testing.assert_close(loss, reference, rtol=TOLERANCE[dtype], atol=1e-5)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert rows == 1 or ours.grad.abs().max() > 1e-3


def test_evaluation_gives_the_training_loss():
    hidden, weight, labels = case(40, 16, 33)
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, weight, labels, chunk=9, functions=ChunkFunctions())
    trained = linear_cross_entropy(hidden.requires_grad_(), weight, labels, chunk=9, functions=ChunkFunctions())
    torch.testing.assert_close(evaluated, trained.detach())


def test_unsupervised_rows_get_no_gradient_even_when_poisoned():
    hidden, weight, labels = case(12, 8, 20)
    labels[:6] = IGNORE
    hidden = hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, labels, chunk=5, functions=ChunkFunctions()).backward()
    assert torch.equal(hidden.grad[:6], torch.zeros(6, 8))
    assert hidden.grad[6:].abs().sum() > 0


def test_a_large_loss_scale_does_not_overflow_the_fp16_gradient_when_tokens_share_it():
    hidden, weight, labels = case(64, 16, 33, torch.float16)
    hidden = hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, chunk=32, functions=ChunkFunctions())
    (loss * (65536.0 / 64)).backward()
    assert torch.isfinite(hidden.grad).all()
    assert hidden.grad.abs().max() > 1


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_the_logits_never_exist_as_a_whole():
    hidden, weight, labels = case(128, 8, 500)
    hidden = hidden.requires_grad_()
    with LargestTensor() as chunked:
        linear_cross_entropy(hidden, weight, labels, chunk=16, functions=ChunkFunctions()).backward()
    with LargestTensor() as whole:
        linear_cross_entropy_reference(hidden, weight, labels).backward()
    assert chunked.numel <= 16 * 500
    assert whole.numel >= 128 * 500


@pytest.mark.parametrize(
    ("rows", "vocabulary", "budget"), [(4096, 128256, 256), (1000, 7, 1), (3, 128256, 1), (8192, 32000, 64)]
)
def test_a_chunk_stays_within_its_budget_unless_one_row_exceeds_it(rows, vocabulary, budget):
    chunk = chunk_rows([rows], vocabulary, budget)
    assert 1 <= chunk <= rows
    assert chunk == 1 or chunk * vocabulary * 4 <= budget * 2**20


def test_one_chunk_size_serves_shapes_of_many_lengths_with_less_padding_than_the_longest_ones_would():
    shapes = [192, 352, 576, 912, 1664, 4096]
    chunk, of_longest = chunk_rows(shapes, 128256, 256), chunk_rows([4096], 128256, 256)
    assert chunk * 128256 * 4 <= 256 * 2**20
    computed = [sum(-(-rows // size) * size for rows in shapes) for size in (chunk, of_longest)]
    assert sum(shapes) <= computed[0] < computed[1]


def test_a_single_shape_is_cut_into_the_fewest_equal_chunks():
    for rows in (1, 100, 523, 524, 4096, 16384):
        fewest = -(-rows // 523)
        assert chunk_rows([rows], 128256, 256) == -(-rows // fewest)
