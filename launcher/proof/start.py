"""Whether what trains computes what stock code computes, on a run's own documents, before its first step.

Both sides are one model: there is no second copy of the weights. Ours is the packed forward, uncompiled. For the stock
side every module is put back to the class that transformers, PEFT or bitsandbytes gave it, attention to "eager" (which
leaves out nothing that a model asks of it), and each document goes alone through the model's own forward. LoRA B is
moved first: at zero, where training begins, no gradient reaches A. Everything is put back bit by bit afterwards:
adapters, classes, random states; the data loader is not touched.

    packed        [a a a a | b b b b b]      one block, pieces of the run's documents
    stock         [a a a a]   [b b b b b]    one after the other

Every token is a target here: what is compared is the forward and backward pass, not the data.

In half precision two right forwards of a deep model may be farther apart than the limits are. Where they are, and only
there, stock code computes once more, in float32 arithmetic (float32_stock.py), and both sides are judged by it, as
parity judges (gate.py): ours must be about as near to it as stock code is.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from launcher.data.pack.blocks import Blocks
from launcher.data.pack.micro_batch import IGNORE
from launcher.model.build import BuiltModel
from launcher.model.packed import nothing_around
from launcher.proof.first_difference import first_difference
from launcher.proof.float32_stock import float32_arithmetic
from launcher.proof.gate import HALF, Comparison, Measured, adapter_of, gate_of
from launcher.proof.stock import Piece, draw_adapters, is_drawn, packed_arguments, stock_code, summed_loss
from launcher.records.parity import DirectionRatios
from launcher.records.run import Verdict

CLAIM = "start equals stock code"
POSITIONS = 512  # compared on each rank
LEAST = 8  # tokens of a document
LOSS_SCALE = 1024.0  # in fp16, whose small gradients would be lost
GRADIENT_ERROR = {torch.float32: 1e-3}  # of all adapters together, relative
GRADIENT_ERROR_HALF = 0.1  # stock code's own error against fp32 is 0.034 for Llama 1B in bf16 (docs/parity.md)
# Against float32. Up to 512 tokens are one batch, in which a single matrix scatters too much to be judged.
GATE_HALF = replace(HALF, direction_ratios=DirectionRatios(matrix=None, kind=1.2, layer=1.5))

Side = tuple[float, list[Tensor]]  # the mean loss and its gradients, by parameter


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
            theirs = measure(_stock_losses(stock, pieces, built.dtype))
        names = [name for name, _ in parameters]
        problems, figures = _compared(ours, theirs, names, built.dtype)
        exact = None
        if problems and built.dtype != torch.float32:
            exact, why = _in_float32(built, partial(_stock_losses, pieces=pieces, dtype=torch.float32), measure)
            figures += f"; beyond a limit, {why}"
        if exact is not None:
            problems, more = _against_float32(ours, theirs, exact, names)
            figures += more
        tokens = sum(map(len, pieces))
        figures += f"; {tokens} tokens in {len(pieces)} documents"
        if not problems:
            return Verdict(CLAIM, True, figures)
        where = first_difference(built, blocks, by_float32=exact is not None) or f"the gradients of {problems[-1]}"
    return Verdict(CLAIM, False, f"first difference: {where}; {figures}")


def _in_float32(
    built: BuiltModel, losses: Callable[[nn.Module], Iterator[Tensor]], measure: Callable[[Iterator[Tensor]], Side]
) -> tuple[Side | None, str]:
    """Stock code's loss and gradients in float32 arithmetic, or None where its modules cannot be had in it; and which
    of the two it is."""
    try:
        with stock_code(built.peft) as stock, float32_arithmetic(stock):
            return measure(losses(stock)), "so judged by stock code in float32: "
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:  # of an architecture that mixes dtypes in its own way
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return None, f"and stock code does not compute in float32 here ({reason})"


def _stock_losses(stock: nn.Module, pieces: Sequence[Piece], dtype: torch.dtype) -> Iterator[Tensor]:
    """Summed, of each document alone."""
    for piece in pieces:
        labels = torch.cat([piece[1:], piece.new_tensor([IGNORE])])
        yield summed_loss(stock, piece[None], labels[None], dtype=dtype)


def _loss_and_gradients(
    losses: Iterable[Tensor], *, parameters: list[nn.Parameter], targets: int, dtype: torch.dtype
) -> Side:
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


def _compared(ours: Side, theirs: Side, names: list[str], dtype: torch.dtype) -> tuple[list[str], str]:
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


def _against_float32(ours: Side, theirs: Side, exact: Side, names: list[str]) -> tuple[list[str], str]:
    """What is farther from float32 than stock code's own error allows; and the figures.

    The loss may be off by the difference that it may have in any case beyond 1.2 times stock code's own error: that of
    a few hundred tokens is positive or negative by chance."""
    comparison = Comparison(sides=("packed", "stock"))
    sides = [
        Measured(loss, {name: gradient.cpu() for name, gradient in zip(names, gradients, strict=True)})
        for loss, gradients in (ours, theirs, exact)
    ]
    comparison.add(*sides, supervised_tokens=0)
    error, limit = comparison.loss_error, GATE_HALF.error_ratio * comparison.loss_error.eager + GATE_HALF.loss
    verdicts = comparison.gradient_verdicts(GATE_HALF)
    problems = ["the loss"] * (not error.compiled <= limit)
    problems += ["all adapters"] * (not all(verdict.holds for verdict in verdicts))
    shown = [f"loss {error.compiled:.1e} apart, stock {error.eager:.1e}, at most {limit:.1e}"]
    shown += [f"gradient error {verdicts[1].evidence}", verdicts[0].evidence]
    shown += [verdict.evidence for verdict in verdicts[2:] if not verdict.holds]
    return problems, "; ".join(shown)


def _cosine(product: float, one: float, other: float, _: float) -> float:
    return product / math.sqrt(one * other) if one and other else float(one == other)


@contextmanager
def _undisturbed(built: BuiltModel, *, seed: int) -> Iterator[None]:
    """Inside, adapters are moved by a draw from `seed` and nothing drops out; after it all is as before."""
    device = built.packed.embed.weight.device
    drawn = [parameter for name, parameter in built.peft.named_parameters() if is_drawn(name, parameter)]
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
