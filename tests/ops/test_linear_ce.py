import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.data.pack.micro_batch import IGNORE
from launcher.ops.capped_ce import chunk_functions
from launcher.ops.chunk_sizes import chunk_rows, product_rows
from launcher.ops.linear_ce import (
    ChunkFunctions,
    TrainedRows,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from tests.support.certain_rows import check_certain_rows

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def case(rows, width, vocabulary, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = IGNORE
    return hidden, weight, labels


def loss_and_gradient(hidden, weight, labels, *, functions=None, **how):
    """The loss, which evaluation gives too, and the gradient of three times that."""
    hidden = hidden.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, functions=functions or ChunkFunctions(), **how)
    (loss * 3).backward()
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, weight, labels, functions=ChunkFunctions(), **how)
    torch.testing.assert_close(evaluated, loss.detach(), equal_nan=True)
    return loss.detach(), hidden.grad


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "chunk"), [(1, 8, 5, 1), (7, 16, 33, 3), (64, 24, 130, 64), (50, 8, 11, 16)]
)
def test_loss_and_gradient_equal_the_plain_form(rows, width, vocabulary, chunk, dtype):
    hidden, weight, labels = case(rows, width, vocabulary, dtype)
    loss, gradient = loss_and_gradient(hidden, weight, labels, chunk=chunk)
    reference = linear_cross_entropy_reference(hidden.requires_grad_(), weight, labels)
    (reference * 3).backward()
    torch.testing.assert_close(loss, reference, rtol=TOLERANCE[dtype], atol=1e-5)
    torch.testing.assert_close(gradient, hidden.grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert rows == 1 or gradient.abs().max() > 1e-3


def test_a_large_loss_scale_does_not_overflow_the_fp16_gradient_when_tokens_share_it():
    hidden, weight, labels = case(64, 16, 33, torch.float16)
    hidden = hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, chunk=32, functions=ChunkFunctions())
    (loss * (65536.0 / 64)).backward()
    assert torch.isfinite(hidden.grad).all()
    assert hidden.grad.abs().max() > 1


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_row_whose_target_is_nearly_certain_keeps_the_gradient_of_the_other_logits(dtype):
    check_certain_rows("cpu", dtype)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest new tensor; views of arguments do not count."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
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
    assert 1 <= chunk < rows + 8
    assert chunk == 1 or chunk * vocabulary * 4 <= budget * 2**20
    assert chunk % 8 == 0 or budget * 2**20 < 8 * vocabulary * 4


def test_one_chunk_size_serves_shapes_of_many_lengths_with_less_padding_than_the_size_of_the_longest():
    shapes = [192, 352, 576, 912, 1664, 4096]
    chunk, of_longest = chunk_rows(shapes, 128256, 256), chunk_rows([4096], 128256, 256)
    assert chunk * 128256 * 4 <= 256 * 2**20
    computed = [sum(-(-rows // size) * size for rows in shapes) for size in (chunk, of_longest)]
    assert sum(shapes) <= computed[0] < computed[1]


def test_a_single_shape_is_cut_into_the_fewest_equal_chunks_of_whole_eights():
    for rows in (1, 100, 520, 521, 809, 4096, 16384):
        fewest = -(-rows // 520)  # 523 rows fit the budget
        chunk = chunk_rows([rows], 128256, 256)
        assert chunk % 8 == 0 and 0 <= chunk * fewest - rows < 8 * fewest


def bounded(rows, targets, *, seed=0):
    """`case` in which `targets` rows, drawn at random, have a target."""
    hidden, weight, _ = case(rows, 16, 33, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.full((rows,), IGNORE)
    labels[torch.randperm(rows, generator=generator)[:targets]] = torch.randint(33, (targets,), generator=generator)
    return hidden, weight, labels


@pytest.mark.parametrize(("rows", "chunk"), [(1, 1), (7, 3), (64, 64), (50, 16), (97, 13)])
@pytest.mark.parametrize("part", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("room", [0, 1, 5])
def test_without_rows_that_have_no_target_loss_and_gradient_are_the_same(rows, chunk, part, room):
    targets = round(rows * part)
    hidden, weight, labels = bounded(rows, targets, seed=rows)
    max_targets = max(1, targets + room)
    loss, gradient = loss_and_gradient(hidden, weight, labels, chunk=chunk, max_targets=max_targets)
    whole_loss, whole_gradient = loss_and_gradient(hidden, weight, labels, chunk=chunk)
    if max_targets >= rows:  # nothing to leave out: the same path, to the bit
        assert torch.equal(loss, whole_loss) and torch.equal(gradient, whole_gradient)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-6, atol=1e-6)
    assert torch.equal(gradient[labels == IGNORE], torch.zeros(rows - targets, 16))
    assert targets == 0 or gradient.abs().max() > 1e-3
    assert targets > 0 or float(loss) == 0


def test_only_the_bounded_number_of_rows_reaches_the_head_with_targets_first_in_their_order():
    hidden, weight, labels = bounded(40, 11)
    seen = []

    def loss_and_grad(h, w, y):
        seen.append((h, y))
        return ChunkFunctions().loss_and_grad(h, w, y)

    functions = ChunkFunctions(loss_and_grad=loss_and_grad)
    loss_and_gradient(hidden, weight, labels, chunk=7, max_targets=13, functions=functions)
    assert [len(y) for _, y in seen] == [7, 7]  # 13 rows, one of padding
    asked = torch.cat([y for _, y in seen])
    assert asked.tolist() == [*labels[labels != IGNORE].tolist(), IGNORE, IGNORE, -1]
    assert torch.equal(torch.cat([h for h, _ in seen])[:11], hidden[labels != IGNORE])
    seen.clear()
    loss_and_gradient(hidden, weight, labels, chunk=7, functions=functions)
    assert len(seen) == 6


@pytest.mark.parametrize("targets", [5, 6, 30])
def test_more_targets_than_the_bound_make_the_loss_nan(targets):
    hidden, weight, labels = bounded(30, targets)
    loss, _ = loss_and_gradient(hidden, weight, labels, chunk=4, max_targets=5)
    assert loss.isnan() == (targets > 5)


def test_the_host_need_not_know_which_rows_have_a_target():
    with torch.device("meta"):  # tensors without values: what asks for one raises
        hidden, weight, labels = torch.empty(30, 8, requires_grad=True), torch.empty(20, 8), torch.empty(30).long()
        linear_cross_entropy(hidden, weight, labels, chunk=4, max_targets=9, functions=ChunkFunctions()).backward()
        assert hidden.grad.shape == hidden.shape
        with pytest.raises((NotImplementedError, RuntimeError)):
            hidden[(labels != IGNORE).nonzero()]


def test_the_forward_pass_allocates_nothing_for_the_rows_left_out():
    hidden, weight, labels = bounded(128, 40)
    hidden = hidden.requires_grad_()
    largest = []
    for max_targets in (40, None):
        with LargestTensor() as recorder:
            linear_cross_entropy(hidden, weight, labels, chunk=16, max_targets=max_targets, functions=ChunkFunctions())
        largest.append(recorder.numel)
    assert largest == [40 * 16, 128 * 16]  # the gradients; a chunk's logits are 16 * 33


def test_rows_are_left_out_where_a_twentieth_of_them_can_be():
    assert product_rows(4096, 2425) == 2425
    assert product_rows(4096, 3891) == 3891 and product_rows(4096, 3892) == 4096
    assert product_rows(2 * 2048, 2 * 2047) == 4096  # full rows of random tokens
    assert product_rows(64, 0) == 1


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_capped_logits_have_the_loss_and_gradient_of_the_plain_form(dtype):
    hidden, weight, labels = case(50, 16, 33, dtype)
    cap, functions, exact = 1.5, chunk_functions(1.5), hidden.double().requires_grad_()
    ours = hidden.clone().requires_grad_()
    loss = linear_cross_entropy(ours, weight, labels, chunk=16, functions=functions)
    loss.backward()
    logits = cap * torch.tanh(exact @ weight.double().T / cap)
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
    plain.backward()
    torch.testing.assert_close(loss.double(), plain, rtol=TOLERANCE[dtype], atol=0)
    assert (ours.grad - exact.grad).norm() < TOLERANCE[dtype] * exact.grad.norm()
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, weight, labels, chunk=16, functions=functions)
        uncapped = linear_cross_entropy(hidden, weight, labels, chunk=16, functions=ChunkFunctions())
    torch.testing.assert_close(evaluated, loss.detach(), rtol=1e-3, atol=0)
    assert abs(uncapped / loss - 1) > 0.02


@pytest.mark.parametrize("max_targets", [None, 40])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_trained_rows_of_the_head_get_the_gradient_that_the_whole_head_would(dtype, cap, max_targets):
    hidden, weight, labels = case(50, 16, 33, dtype)
    ids = torch.tensor([0, int(labels[labels >= 0][0]), 32])  # the second is a target
    rows = weight[ids].float().requires_grad_()
    ours, exact = hidden.clone().requires_grad_(), weight.double().requires_grad_()
    how = {"chunk": 16, "functions": chunk_functions(cap), "max_targets": max_targets}
    loss = linear_cross_entropy(ours, weight, labels, **how, trained=TrainedRows(ids, rows))
    (loss * 3).backward()
    logits = hidden.double() @ exact.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    (3 * torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)).backward()
    for found, expected in zip(rows.grad, exact.grad[ids], strict=True):
        assert expected.norm() > 0.05 and (found - expected).norm() < TOLERANCE[dtype] * expected.norm()
    without = hidden.clone().requires_grad_()
    (linear_cross_entropy(without, weight, labels, **how) * 3).backward()
    assert torch.equal(ours.grad, without.grad)
