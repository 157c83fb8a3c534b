"""Whether what trains computes what stock code computes, on a run's own documents, before its first step.

Both sides are one model: there is no second copy of the weights. Ours is the packed forward, uncompiled. For the stock
side every module is put back to the class that transformers, PEFT or bitsandbytes gave it, attention to "eager" (which
leaves out nothing that a model asks of it), and each document goes alone through the model's own forward. LoRA B is
drawn first: at zero, where training begins, no gradient reaches A. Everything is put back bit by bit afterwards:
adapters, classes, random states; the data loader is not touched.

    packed        [a a a a | b b b b b]      one block, pieces of the run's documents
    stock         [a a a a]   [b b b b b]    one after the other

Every token is a target here: what is compared is the forward and backward pass, not the data.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from launcher.data.pack.blocks import Blocks
from launcher.model.build import BuiltModel
from launcher.model.packed import nothing_around
from launcher.proof.first_difference import first_difference
from launcher.proof.gate import adapter_of, gate_of
from launcher.proof.stock import Piece, draw_adapters, is_drawn, packed_arguments, stock_code, summed_loss
from launcher.records.run import Verdict

CLAIM = "start equals stock code"
POSITIONS = 512  # compared on each rank
LEAST = 8  # tokens of a document
LOSS_SCALE = 1024.0  # in fp16, whose small gradients would be lost
GRADIENT_ERROR = {torch.float32: 1e-3}  # of all adapters together, relative
GRADIENT_ERROR_HALF = 0.1  # stock code's own error against fp32 is 0.034 for Llama 1B in bf16 (docs/parity.md)


def pieces_of(blocks: Blocks, *, positions: int, rank: int, ranks: int) -> list[Piece]:
    """The token ids of the first documents of this rank's share of the blocks, cut so that there are at least two, of
    `positions` tokens together; int64 [L] each."""
    pieces: list[Piece] = []
    left = positions
    for block in range(rank % len(blocks), len(blocks), ranks):
        for index in blocks[block].tolist():
            ids = blocks.documents[index].input_ids[: min(left, max(positions // 2, LEAST))]
            if len(ids) >= LEAST:
                pieces.append(torch.tensor(ids, dtype=torch.int64))
                left -= len(ids)
        if left < LEAST:
            break
    return list(pieces[0].split(math.ceil(len(pieces[0]) / 2))) if len(pieces) == 1 else pieces


def start_verdict(built: BuiltModel, pieces: Sequence[Piece], *, seed: int) -> Verdict:
    """Compare loss and gradients of the LoRA adapters of both sides on `pieces`. Changes nothing that lasts."""
    if not pieces:
        return Verdict(CLAIM, False, f"no document has {LEAST} tokens or more: there is nothing to compare")
    packed, parameters = built.packed, [(n, p) for n, p in built.peft.named_parameters() if p.requires_grad]
    device = packed.embed.weight.device
    pieces = [piece.to(device) for piece in pieces]
    blocks = [[piece] for piece in pieces] if built.attention in ("causal", "cudnn") else [pieces]
    trained, targets = [parameter for _, parameter in parameters], sum(len(piece) - 1 for piece in pieces)
    with _undisturbed(built, seed=seed):
        measure = partial(_loss_and_gradients, parameters=trained, targets=targets, dtype=built.dtype)
        ours = measure(packed(*packed_arguments(block)) for block in blocks)
        with stock_code(built.peft) as stock:
            alone = ((piece[None], torch.cat([piece[1:], piece.new_tensor([-100])])[None]) for piece in pieces)
            losses = (summed_loss(stock, ids, labels, dtype=built.dtype) for ids, labels in alone)
            theirs = measure(losses)
        problems, figures = _compared(ours, theirs, [name for name, _ in parameters], built.dtype)
        tokens = sum(map(len, pieces))
        figures += f"; {tokens} tokens in {len(pieces)} documents"
        if not problems:
            return Verdict(CLAIM, True, figures)
        where = first_difference(built, blocks) or f"the gradients of {problems[-1]}"
    return Verdict(CLAIM, False, f"first difference: {where}; {figures}")


def _loss_and_gradients(
    losses: Iterable[Tensor], *, parameters: list[nn.Parameter], targets: int, dtype: torch.dtype
) -> tuple[float, list[Tensor]]:
    """The mean over all targets, and its gradients, of summed `losses`, each of which is computed once the gradients of
    the one before are."""
    total, sums = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
    scale = LOSS_SCALE if dtype == torch.float16 else 1.0
    for loss in losses:
        gradients = torch.autograd.grad(loss * (scale / targets), parameters, materialize_grads=True)
        for one, gradient in zip(sums, gradients, strict=True):
            one += gradient
        total += float(loss.detach())
    return total / targets, sums


def _compared(
    ours: tuple[float, list[Tensor]], theirs: tuple[float, list[Tensor]], names: list[str], dtype: torch.dtype
) -> tuple[list[str], str]:
    """What differs too much, the least equal kind of adapter last; and the figures."""
    gate = gate_of(dtype)
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))
    for name, a, b in zip(names, ours[1], theirs[1], strict=True):
        _, kind, matrix = adapter_of(name)
        a, b = (gradient.detach().double().flatten().cpu() for gradient in (a, b))
        sums[f"{kind} {matrix}"] += torch.stack([a @ b, a @ a, b @ b, (a - b) @ (a - b)])
    cosines = {kind: _cosine(*of.tolist()) for kind, of in sums.items()}
    _, _, square, apart = torch.stack(list(sums.values())).sum(0).tolist()
    error = math.sqrt(apart / square) if square else math.inf
    loss = abs(ours[0] - theirs[0]) / abs(theirs[0]) if theirs[0] else math.inf
    least = min(cosines, key=lambda kind: cosines[kind])
    error_limit = GRADIENT_ERROR.get(dtype, GRADIENT_ERROR_HALF)
    problems = ["the loss"] * (not loss <= gate.loss) + ["all adapters"] * (not error <= error_limit)
    problems += [least] * (not cosines[least] >= gate.cosine)
    figures = (
        f"mean loss {ours[0]:.4f} packed, {theirs[0]:.4f} in stock code ({loss:.1e} apart, at most {gate.loss:.0e}); "
        f"gradients {error:.1e} apart, at most {error_limit:.0e}, least cosine {least} {cosines[least]:.5f}"
    )
    return problems, figures


def _cosine(product: float, one: float, other: float, _: float) -> float:
    return product / math.sqrt(one * other) if one and other else float(one == other)


@contextmanager
def _undisturbed(built: BuiltModel, *, seed: int) -> Iterator[None]:
    """Inside, adapters are drawn from `seed` and nothing drops out; after it all is as before."""
    device = built.packed.embed.weight.device
    drawn = [parameter for name, parameter in built.peft.named_parameters() if is_drawn(name)]
    dropouts = [(module, module.p) for module in built.peft.modules() if isinstance(module, nn.Dropout)]
    saved, around = [parameter.detach().clone() for parameter in drawn], built.packed.body.around
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        noise, bounds = built.packed.neftune_alpha, built.packed.loss_bounds
        try:
            built.packed.body.around, built.packed.neftune_alpha = nothing_around, 0.0
            built.packed.loss_bounds = {}  # here every token is a target
            draw_adapters(built.peft, seed=seed)
            for module, _ in dropouts:
                module.p = 0.0
            yield
        finally:
            built.packed.body.around, built.packed.neftune_alpha = around, noise
            built.packed.loss_bounds = bounds
            with torch.no_grad():
                for parameter, before in zip(drawn, saved, strict=True):
                    parameter.copy_(before)
            for module, probability in dropouts:
                module.p = probability
