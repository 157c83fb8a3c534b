"""Linear head and cross-entropy in chunks: the [N, V] logits never exist as a whole.

Letters: N tokens (B * S), M rows of the product, D model width, V vocabulary, R rows of one chunk.

The head is frozen, so only the hidden states need a gradient, and a chunk that has computed its logits has all that
this gradient needs. It is therefore computed in the forward pass, chunk by chunk, and the backward pass is one
multiplication: the logits are computed once, and only one [R, V] chunk of them exists at a time.

For one row with logits z, target t and p = softmax(z):   loss = logsumexp(z) - z[t],   dloss/dh = (p - onehot(t)) W.

The loss is the *sum* over supervised rows. Its gradient is stored unscaled, and the caller's factor (one over the
global token count, times the fp16 loss scale) arrives as the incoming gradient: nothing underflows in half precision.

Prompts and padding have no target: half of the rows in instruction data, and each costs the whole vocabulary. Where it
is known beforehand that at most M < N rows are supervised, only M rows go through the product: they are gathered chunk
by chunk, and their gradient is scattered into zeros. M is a constant of the shape, and nothing waits for the device:
a stable sort puts the supervised rows first, in their order, and unsupervised ones fill the rest.

    labels    .  .  5  7  .  .  .  3      N = 8, M = 4, a dot is a negative label
    rows      2  3  7  0                  labels[rows] = 5 7 3 .
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.ops.projection_group import HAS_TRITON

CHUNK_COST = 128  # rows whose time a chunk costs on top: it reads the whole head, and launches its kernels
TILE = 8  # a chunk has a multiple of this many rows, for the alignment of half-precision products
MIN_SAVED = 0.05  # share of the rows below which none are left out; `product_rows` says why


def chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed loss of one chunk. hidden [R, D], weight [V, D], labels [R] -> scalar, fp32."""
    logits = (hidden @ weight.T).float()
    supervised = labels >= 0
    target_logit = logits.gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    return ((torch.logsumexp(logits, dim=1) - target_logit) * supervised).sum()


def chunk_loss_and_grad(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`chunk_loss` and its gradient with respect to hidden ([R, D], hidden's dtype)."""
    logits = hidden @ weight.T
    if logits.is_cuda and HAS_TRITON:
        losses = softmax_gradient_(logits, labels)
        return losses.sum(), logits @ weight
    loss, grad_logits = softmax_gradient(logits, labels)
    return loss, grad_logits.to(hidden.dtype) @ weight


def softmax_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The plain form. logits [R, V], labels [R] -> summed loss and its gradient with respect to the logits, fp32."""
    logits = logits.float()
    supervised = labels >= 0
    targets = labels.clamp_min(0)[:, None]
    target_logit = logits.gather(1, targets).squeeze(1)
    log_sum = torch.logsumexp(logits, dim=1)
    loss = ((log_sum - target_logit) * supervised).sum()
    is_target = torch.arange(logits.shape[1], device=labels.device)[None, :] == targets
    return loss, (torch.exp(logits - log_sum[:, None]) - is_target.float()) * supervised[:, None]


@torch.library.custom_op("qlora::softmax_gradient_", mutates_args=("logits",))
def softmax_gradient_(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses [R], fp32, of logits [R, V] on CUDA; overwrites the logits by their gradient. Two passes over one buffer,
    where the compiled plain form needs two buffers."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _softmax_gradient[(logits.shape[0],)](logits, labels, losses, logits.shape[1], BV=8192, num_warps=8)
    return losses


@softmax_gradient_.register_fake
def _(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _softmax_gradient(logits, labels, losses, V, BV: tl.constexpr):  # type: ignore[no-untyped-def]
        """One row: the running maximum and sums, BV columns at a time, then the gradient. The eviction hints keep the
        row in the device's cache until it is read again."""
        row = tl.program_id(0).to(tl.int64)
        label = tl.load(labels + row)
        start = logits + row * V
        # Read before the sums: their barriers separate it from the second loop, which overwrites it.
        target = tl.load(start + tl.maximum(label, 0)).to(tl.float32)
        top = -float("inf")
        total = tl.zeros((BV,), tl.float32)
        for first in range(0, V, BV):
            column = first + tl.arange(0, BV)
            z = tl.load(start + column, mask=column < V, other=-float("inf"), eviction_policy="evict_last").to(
                tl.float32
            )
            higher = tl.maximum(top, tl.max(z, 0))
            total = total * tl.exp(top - higher) + tl.exp(z - higher)
            top = higher
        log_sum = top + tl.log(tl.sum(total, 0))
        supervised = tl.where(label >= 0, 1.0, 0.0)
        tl.store(losses + row, (log_sum - target) * supervised)
        for first in range(0, V, BV):
            column = first + tl.arange(0, BV)
            z = tl.load(start + column, mask=column < V, other=0.0, eviction_policy="evict_first").to(tl.float32)
            gradient = (tl.exp(z - log_sum) - tl.where(column == label, 1.0, 0.0)) * supervised
            gradient = gradient.to(logits.dtype.element_ty)
            tl.store(start + column, gradient, mask=column < V, eviction_policy="evict_first")


@dataclass
class ChunkFunctions:
    """The two functions of one chunk; the compile plan replaces each by its compiled form."""

    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = chunk_loss
    loss_and_grad: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = chunk_loss_and_grad


def product_rows(tokens: int, max_targets: int) -> int:
    """M, the rows of the product, for `tokens` (N) of which at most `max_targets` are supervised."""
    # Each row left out saves 2 * D * V multiply-adds and the passes over its V logits. Selecting, gathering and
    # scattering rows costs about ten small kernels and five passes over [N, D]: an estimated 90 us for 4,096 rows on an
    # H200, where Llama 1B's head takes 1.6 us per row. So leaving out a twentieth pays at that size, and breaks even at
    # a quarter of it. Full blocks, whose every token but the first is a target, keep the path without indices.
    return max(1, max_targets) if max_targets <= (1 - MIN_SAVED) * tokens else tokens


def chunk_rows(rows: Collection[int], vocabulary: int, budget_mib: int, *, itemsize: int = 4) -> int:
    """The chunk size R for batches of `rows` rows (M of each planned shape), whose logits of `itemsize` bytes take at
    most `budget_mib` MiB (2**20 bytes).

    There is one size, since each would need its own graph. It is the one with the least work over all shapes (rows
    computed, padding included, plus CHUNK_COST per chunk) among those that divide a shape into equal chunks. For a
    single shape that gives the fewest equal chunks of a multiple of TILE rows.
    """
    max_rows = max(1, budget_mib * 2**20 // (itemsize * vocabulary))
    step = TILE if max_rows >= TILE else 1
    max_rows -= max_rows % step
    fewest = [-(-n // max_rows) for n in rows]  # chunks of each shape
    pairs = ((n, chunks) for n, least in zip(rows, fewest, strict=True) for chunks in range(least, 2 * least + 1))
    sizes = {-(-n // (chunks * step)) * step for n, chunks in pairs}
    return min(sorted(sizes, reverse=True), key=lambda size: sum(-(-n // size) * (size + CHUNK_COST) for n in rows))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk: int,
    functions: ChunkFunctions,
    max_targets: int | None = None,
) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T` against `labels`, of which negative ones have no loss.

    hidden [N, D], weight [V, D] (frozen: it gets no gradient), labels [N] already shifted -> scalar, fp32. At most
    `max_targets` (M) labels have a loss, as the caller promises: with more, the loss is NaN. None: all may.
    """
    assert not weight.requires_grad, "the head is frozen in QLoRA; this loss gives it no gradient"
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, functions, max_targets)
    total, rows = _total_and_rows(labels, max_targets)
    for h, y, _ in _chunks(hidden, labels, rows, chunk=chunk):
        total = total + functions.loss(h, weight, y)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, fns: ChunkFunctions, bound: int | None
    ) -> Tensor:
        total, rows = _total_and_rows(labels, bound)
        grad = hidden.new_empty(hidden.shape if rows is None else (len(rows), hidden.shape[1]))
        for h, y, place in _chunks(hidden.detach(), labels, rows, chunk=chunk):
            loss, grad_h = fns.loss_and_grad(h, weight, y)
            total += loss
            grad[place] = grad_h[: place.stop - place.start]
        ctx.save_for_backward(grad, rows)
        ctx.tokens = len(labels)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad, rows = ctx.saved_tensors
        # The factor is fp32 and may be large (fp16 loss scale over token count): multiply in fp32, round once. With one
        # dimension it takes part in type promotion, and one kernel does both.
        grad = torch.mul(grad, grad_output.reshape(1), out=torch.empty_like(grad))
        if rows is not None:  # each row occurs once, so the result does not depend on an order
            grad = grad.new_zeros(ctx.tokens, grad.shape[1]).index_copy_(0, rows, grad)
        return grad, None, None, None, None, None


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
