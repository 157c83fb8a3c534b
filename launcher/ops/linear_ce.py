"""Linear head and cross-entropy as one chunked operation: the [N, V] logits never exist as a whole.

Letters: N tokens (B * S), D model width, V vocabulary, R rows of one chunk.

The head is frozen, so the only gradient wanted is that of the hidden states, and a chunk that has just made its
logits has everything that gradient needs. It is therefore made in the forward pass, chunk by chunk, and the backward
pass is one multiplication: the logits are computed once, and one [R, V] chunk is all that ever lives.

For one row with logits z, target t and p = softmax(z):   loss = logsumexp(z) - z[t],   dloss/dh = (p - onehot(t)) W.

The loss is the *sum* over supervised rows. Its gradient is stored unscaled, and the caller's factor (one over the
global token count, times the fp16 loss scale) arrives as the incoming gradient: nothing underflows in half precision.
"""

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a label that is not supervised; the value that torch's own cross-entropy uses
CHUNK_COST = 128  # rows whose time a chunk costs on top: it reads the whole head, and launches its kernels


def chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed loss of one chunk. hidden [R, D], weight [V, D], labels [R] -> scalar, fp32."""
    logits = (hidden @ weight.T).float()
    supervised = labels != IGNORE
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
    supervised = labels != IGNORE
    targets = labels.clamp_min(0)[:, None]
    target_logit = logits.gather(1, targets).squeeze(1)
    log_sum = torch.logsumexp(logits, dim=1)
    loss = ((log_sum - target_logit) * supervised).sum()
    is_target = torch.arange(logits.shape[1], device=labels.device)[None, :] == targets
    return loss, (torch.exp(logits - log_sum[:, None]) - is_target.float()) * supervised[:, None]


@torch.library.custom_op("qlora::softmax_gradient_", mutates_args=("logits",))
def softmax_gradient_(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses [R], fp32, of logits [R, V] on CUDA, in whose place their gradient is put: two passes over one buffer,
    where the compiled plain form needs a second one."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _softmax_gradient[(logits.shape[0],)](logits, labels, losses, logits.shape[1], BV=8192, num_warps=8)
    return losses


@softmax_gradient_.register_fake
def _(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _softmax_gradient(logits, labels, losses, V, BV: tl.constexpr):  # type: ignore[no-untyped-def]
        """One row: the running maximum and sums of BV columns at once, then the gradient. The hints keep a row in the
        device's cache for the second reading, and what is done with out of it."""
        row = tl.program_id(0).to(tl.int64)
        label = tl.load(labels + row)
        start = logits + row * V
        # Before the sums, whose barriers part it from the second loop: that puts the gradient in its place.
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
        supervised = tl.where(label == -100, 0.0, 1.0)  # IGNORE
        tl.store(losses + row, (log_sum - target) * supervised)
        for first in range(0, V, BV):
            column = first + tl.arange(0, BV)
            z = tl.load(start + column, mask=column < V, other=0.0, eviction_policy="evict_first").to(tl.float32)
            gradient = (tl.exp(z - log_sum) - tl.where(column == label, 1.0, 0.0)) * supervised
            gradient = gradient.to(logits.dtype.element_ty)
            tl.store(start + column, gradient, mask=column < V, eviction_policy="evict_first")


@dataclass
class ChunkFunctions:
    """The two chunk bodies as the loss calls them; the compile plan replaces each by its compiled form."""

    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = chunk_loss
    loss_and_grad: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = chunk_loss_and_grad


def chunk_rows(rows: Collection[int], vocabulary: int, budget_mib: int, *, itemsize: int = 4) -> int:
    """The one chunk size R for batches of `rows` tokens (N of each planned shape): logits of `itemsize` bytes within
    `budget_mib` MiB.

    One size, because each would be a graph of its own. Of the sizes that divide a shape into equal chunks, the one with
    the least work over all shapes: the rows computed, padding included, and CHUNK_COST for each chunk. For a single
    shape these are the fewest equal chunks. MiB is 2**20 bytes.
    """
    most = max(1, budget_mib * 2**20 // (itemsize * vocabulary))
    sizes = {-(-n // chunks) for n in rows for chunks in range(-(-n // most), 2 * -(-n // most) + 1)}
    return min(sorted(sizes, reverse=True), key=lambda size: sum(-(-n // size) * (size + CHUNK_COST) for n in rows))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int, functions: ChunkFunctions
) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T` against `labels`, over the labels that are not IGNORE.

    hidden [N, D], weight [V, D] (frozen: it gets no gradient), labels [N] already shifted -> scalar, fp32.
    """
    assert not weight.requires_grad, "the head is frozen in QLoRA; this loss gives it no gradient"
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, functions)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for h, y, _ in _chunks(hidden, labels, chunk):
        total = total + functions.loss(h, weight, y)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, fns: ChunkFunctions) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden)
        for h, y, rows in _chunks(hidden.detach(), labels, chunk):
            loss, grad_h = fns.loss_and_grad(h, weight, y)
            total += loss
            grad[rows] = grad_h[: rows.stop - rows.start]
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        # The factor is fp32 and may be large (fp16 loss scale over token count): multiply wide, round once. As a tensor
        # of one dimension it counts for the type of the product, which one kernel makes.
        return torch.mul(grad, grad_output.reshape(1), out=torch.empty_like(grad)), None, None, None, None


def _chunks(hidden: Tensor, labels: Tensor, chunk: int) -> list[tuple[Tensor, Tensor, slice]]:
    """Equal chunks; the last is padded with unsupervised rows, so that the compiled body sees one shape."""
    rows = hidden.shape[0]
    pieces = []
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        h, y = hidden[start:stop], labels[start:stop]
        if stop - start < chunk:
            h = F.pad(h, (0, 0, 0, chunk - (stop - start)))
            y = F.pad(y, (0, chunk - (stop - start)), value=IGNORE)
        pieces.append((h, y, slice(start, stop)))
    return pieces


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The plain form: all logits at once, torch's own cross-entropy. Same arguments and result."""
    logits = (hidden @ weight.T).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
