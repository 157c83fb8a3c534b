"""Linear head and cross-entropy in chunks: the [N, V] logits never exist as a whole.

Letters: N tokens (B * S), M rows of the product, D model width, V vocabulary, R rows of one chunk.

The head is frozen, so only the hidden states need a gradient, and a chunk that has computed its logits has all that
this gradient needs. It is therefore computed in the forward pass, chunk by chunk, and the backward pass is one
multiplication: the logits are computed once, and only one [R, V] chunk of them exists at a time.

For one row with logits z, target t and p = softmax(z):   loss = logsumexp(z) - z[t],   dloss/dh = (p - onehot(t)) W.

The loss is the *sum* over supervised rows. Its gradient is stored without the caller's factor (one over the global
token count, times the fp16 loss scale), which arrives as the incoming gradient.

fp16 needs more: where p[t] is nearly 1, the other p are below its smallest number, and so would be the gradient. So
each row p - onehot(t) is multiplied by a power of two that brings its largest entry, 1 - p[t], to between 128 and 256;
the product is divided by it in fp32, and stored in fp32. The product then holds for weights up to 128. In bf16 and
fp32, which have the range, the power is 1 and nothing is done.

Prompts and padding have no target: half of the rows in instruction data, and each costs the whole vocabulary. Where it
is known beforehand that at most M < N rows are supervised, only M rows go through the product: they are gathered chunk
by chunk, and their gradient is scattered into zeros. M is a constant of the shape, and nothing waits for the device:
a stable sort puts the supervised rows first, in their order, and unsupervised ones fill the rest.

    labels    .  .  5  7  .  .  .  3      N = 8, M = 4, a dot is a negative label
    rows      2  3  7  0                  labels[rows] = 5 7 3 .

Some rows of the head may be trained (model/trained_tokens.py). The head holds their values, so the logits are as ever,
and of the gradient with respect to the head only these rows are made, chunk by chunk, summed in fp32:

    dloss/dW[i] = sum over rows of (p - onehot(t))[i] h
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.ops.projection_group import HAS_TRITON

SCALED_TO = 8  # log2 of the most that an entry of a scaled row may be
SMALLEST = 2.0**-24  # the least 1 - p[t] that is brought there: the powers stay finite


def chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed loss of one chunk. hidden [R, D], weight [V, D], labels [R] -> scalar, fp32."""
    logits = (hidden @ weight.T).float()
    supervised = labels >= 0
    target_logit = logits.gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    return ((torch.logsumexp(logits, dim=1) - target_logit) * supervised).sum()


def chunk_loss_and_grad(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`chunk_loss` and its gradient with respect to hidden: [R, D] in `gradient_dtype` of hidden's."""
    loss, logits, scales = _loss_and_scaled_rows(hidden, weight, labels)
    return loss, unscaled_product(logits, weight, scales)


def chunk_loss_and_grads(
    hidden: Tensor, weight: Tensor, labels: Tensor, trained: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`chunk_loss_and_grad`, and the gradient of the rows `trained` [n] of weight: [n, D], fp32."""
    loss, rows, scales = _loss_and_scaled_rows(hidden, weight, labels)
    return loss, unscaled_product(rows, weight, scales), trained_gradient(rows, scales, trained, hidden)


def _loss_and_scaled_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss; its gradient with respect to the logits [R, V] as `scaled_rows` gives it, and the powers [R]."""
    logits = hidden @ weight.T
    if logits.is_cuda and HAS_TRITON:
        losses, scales = softmax_gradient_(logits, labels)
        return losses.sum(), logits, scales
    loss, gradient = softmax_gradient(logits, labels)
    logits, scales = scaled_rows(gradient, hidden.dtype)
    return loss, logits, scales


def unscaled_product(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """rows [R, V] as `scaled_rows` gives them, weight [V, D] -> [R, D] in `gradient_dtype`."""
    grad = rows @ weight
    return grad.float() / scales[:, None] if rows.dtype == torch.float16 else grad


def trained_gradient(rows: Tensor, scales: Tensor, trained: Tensor, hidden: Tensor) -> Tensor:
    """rows [R, V] as `scaled_rows` gives them, hidden [R, D] -> the gradient of the rows `trained` [n] of the head:
    [n, D], fp32."""
    chosen = rows[:, trained].float()
    if rows.dtype == torch.float16:
        chosen = chosen / scales[:, None]
    return chosen.T @ hidden.float()


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the gradient of hidden states of `dtype` waits for the caller's factor."""
    return torch.float32 if dtype == torch.float16 else dtype


def softmax_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The plain form. logits [R, V], labels [R] -> summed loss and its gradient with respect to the logits, fp32.

    p[t] - 1 is computed as minus the sum of the other p, which keeps its digits where p[t] is nearly 1."""
    targets, supervised = labels.clamp_min(0)[:, None], labels >= 0
    logits = logits.float()
    top = logits.amax(1, keepdim=True)
    is_target = torch.arange(logits.shape[1], device=labels.device)[None, :] == targets
    others = torch.where(is_target, 0.0, torch.exp(logits - top))
    rest, target = others.sum(1, keepdim=True), logits.gather(1, targets) - top
    total = rest + torch.exp(target)
    loss = ((total.log() - target) * supervised[:, None]).sum()
    return loss, torch.where(is_target, -rest, others) / total * supervised[:, None]


def scaled_rows(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """gradient [R, V] fp32 -> in `dtype`, for fp16 with each row multiplied by its power of two; these powers [R]."""
    if dtype != torch.float16:
        return gradient.to(dtype), gradient.new_ones(gradient.shape[0])
    largest = gradient.abs().amax(1).clamp_min(SMALLEST)
    scales = torch.exp2(SCALED_TO - torch.ceil(torch.log2(largest)))
    return (gradient * scales[:, None]).to(dtype), scales


@torch.library.custom_op("qlora::softmax_gradient_", mutates_args=("logits",))
def softmax_gradient_(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """logits [R, V] on CUDA -> losses [R], fp32, and the powers of two [R] of fp16 rows (of other dtypes undefined);
    overwrites the logits by their gradient, of fp16 times these powers. Two passes over one buffer, where the compiled
    plain form needs two buffers."""
    losses, scales = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    _softmax_gradient[(logits.shape[0],)](
        logits, labels, losses, scales, logits.shape[1], SMALLEST=SMALLEST, SCALED_TO=SCALED_TO, BV=8192, num_warps=8
    )
    return losses, scales


@softmax_gradient_.register_fake
def _(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    losses, scales = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    return losses, scales


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _softmax_gradient(  # type: ignore[no-untyped-def]
        logits, labels, losses, scales, V, SMALLEST: tl.constexpr, SCALED_TO: tl.constexpr, BV: tl.constexpr,
    ):  # fmt: skip
        """One row: the running maximum and sums, BV columns at a time, then the gradient. The eviction hints keep the
        row in the device's cache until it is read again."""
        row = tl.program_id(0).to(tl.int64)
        label = tl.load(labels + row)
        start = logits + row * V
        # Read before the sums: their barriers separate it from the second loop, which overwrites it.
        target = tl.load(start + tl.maximum(label, 0)).to(tl.float32)
        top = -float("inf")
        rest = tl.zeros((BV,), tl.float32)  # of all but the target
        for first in range(0, V, BV):
            column = first + tl.arange(0, BV)
            z = tl.load(start + column, mask=column < V, other=-float("inf"), eviction_policy="evict_last").to(
                tl.float32
            )
            higher = tl.maximum(top, tl.max(z, 0))
            others = tl.where(column == label, 0.0, tl.exp(z - higher))
            rest = rest * tl.exp(top - higher) + others
            top = higher
        rest_sum = tl.sum(rest, 0)
        total = rest_sum + tl.exp(target - top)
        supervised = tl.where(label >= 0, 1.0, 0.0)
        tl.store(losses + row, (tl.log(total) - (target - top)) * supervised)
        factor = supervised / total
        if logits.dtype.element_ty == tl.float16:
            scale = tl.exp2(SCALED_TO - tl.ceil(tl.log2(tl.maximum(rest_sum / total, SMALLEST))))
            tl.store(scales + row, scale)
            factor *= scale
        for first in range(0, V, BV):
            column = first + tl.arange(0, BV)
            z = tl.load(start + column, mask=column < V, other=0.0, eviction_policy="evict_first").to(tl.float32)
            gradient = tl.where(column == label, -rest_sum, tl.exp(z - top)) * factor
            gradient = gradient.to(logits.dtype.element_ty)
            tl.store(start + column, gradient, mask=column < V, eviction_policy="evict_first")


@dataclass
class ChunkFunctions:
    """The functions of one chunk; the compile plan replaces those that are used by their compiled forms."""

    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = chunk_loss
    loss_and_grad: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = chunk_loss_and_grad
    loss_and_grads: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = chunk_loss_and_grads


class TrainedRows(NamedTuple):
    """Rows of the head that are trained. The head holds their values; `rows` [n, D], fp32, gets their gradient."""

    ids: Tensor  # [n], which rows of the head they are
    rows: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk: int,
    functions: ChunkFunctions,
    max_targets: int | None = None,
    trained: TrainedRows | None = None,
) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T` against `labels`, of which negative ones have no loss.

    hidden [N, D], weight [V, D] (frozen: it gets no gradient, but for the rows that are `trained`), labels [N] already
    shifted -> scalar, fp32. At most `max_targets` (M) labels have a loss, as the caller promises: with more, the loss
    is NaN. None: all may.
    """
    assert not weight.requires_grad, "the head is frozen in QLoRA; this loss gives it no gradient"
    if torch.is_grad_enabled() and hidden.requires_grad:
        ids, row_values = trained or (None, None)
        return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, functions, max_targets, row_values, ids)
    total, rows = _total_and_rows(labels, max_targets)
    for h, y, _ in _chunks(hidden, labels, rows, chunk=chunk):
        total = total + functions.loss(h, weight, y)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        fns: ChunkFunctions,
        bound: int | None,
        trained: Tensor | None,
        ids: Tensor | None,
    ) -> Tensor:
        total, rows = _total_and_rows(labels, bound)
        shape = hidden.shape if rows is None else (len(rows), hidden.shape[1])
        grad = hidden.new_empty(shape, dtype=gradient_dtype(hidden.dtype))
        grad_trained = None if trained is None else torch.zeros_like(trained)
        for h, y, place in _chunks(hidden.detach(), labels, rows, chunk=chunk):
            if ids is None or grad_trained is None:
                loss, grad_h = fns.loss_and_grad(h, weight, y)
            else:
                loss, grad_h, of_chunk = fns.loss_and_grads(h, weight, y, ids)
                grad_trained += of_chunk
            total += loss
            grad[place] = grad_h[: place.stop - place.start]
        ctx.save_for_backward(grad, rows, grad_trained)
        ctx.tokens, ctx.dtype = len(labels), hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad, rows, grad_trained = ctx.saved_tensors
        # The factor is fp32 and may be large (fp16 loss scale over token count): multiply in fp32, round once. With one
        # dimension it takes part in type promotion, and one kernel does both.
        grad = torch.mul(grad, grad_output.reshape(1), out=torch.empty_like(grad, dtype=ctx.dtype))
        if rows is not None:  # each row occurs once, so the result does not depend on an order
            grad = grad.new_zeros(ctx.tokens, grad.shape[1]).index_copy_(0, rows, grad)
        of_trained = None if grad_trained is None else grad_trained * grad_output
        return grad, None, None, None, None, None, of_trained, None


def _total_and_rows(labels: Tensor, max_targets: int | None) -> tuple[Tensor, Tensor | None]:
    """The initial total, and the rows of the product [M] as drawn at the top; None: all rows in order.

    The total is 0, or NaN where rows with a target would be left out: decided on the device, for the step's gate.
    """
    total = torch.zeros((), dtype=torch.float32, device=labels.device)
    if max_targets is None or max_targets >= len(labels):
        return total, None
    unsupervised = labels < 0
    rows = torch.argsort(unsupervised, stable=True)[:max_targets]
    return total.masked_fill_((~unsupervised).sum() > max_targets, float("nan")), rows


def _chunks(
    hidden: Tensor, labels: Tensor, rows: Tensor | None, *, chunk: int
) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Yield (hidden, labels, place among the `rows`) of equal chunks. The last chunk is padded with unsupervised rows,
    so that the compiled function sees one shape. Gathered rows exist one chunk at a time."""
    total = len(labels if rows is None else rows)
    for start in range(0, total, chunk):
        place = slice(start, min(start + chunk, total))
        where = place if rows is None else rows[place]
        h, y = hidden[where], labels[where]
        missing = start + chunk - place.stop
        if missing:
            h, y = F.pad(h, (0, 0, 0, missing)), F.pad(y, (0, missing), value=-1)
        yield h, y, place


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The plain form: all logits at once, torch's own cross-entropy, which ignores -100. Same result."""
    logits = (hidden @ weight.T).float()
    return F.cross_entropy(logits, labels, reduction="sum")
