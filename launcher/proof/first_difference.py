"""Where the packed forward first computes something else than stock code: module by module, in the order of calls.

In half precision the outputs of deep layers differ though both be right. Where float32 decides, a module is named only
if its output is also farther from stock code's in float32 than stock code's own is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from launcher.model.build import BuiltModel
from launcher.model.logits import finished_logits
from launcher.proof.float32_stock import float32_arithmetic
from launcher.proof.stock import Piece, packed_arguments, stock_code, stock_logits

ERROR = {torch.float32: 1e-4}  # of a module's output, relative
ERROR_HALF = 0.05
RATIO = 2.0  # of the errors against float32; with right forwards it was up to 1.7 for single modules

Outputs = dict[str, Tensor]  # by module, [1, S, width]


@torch.no_grad()
def first_difference(built: BuiltModel, blocks: Sequence[Sequence[Piece]], *, by_float32: bool = False) -> str | None:
    """The first module whose output for a document of `blocks` is another one in stock code, with the figures; None
    where all outputs are equal. `by_float32`: where ours is farther from float32 too."""
    packed, number = built.packed, 0
    for block in blocks:
        ids, _, *rest = packed_arguments(block)
        ours: Outputs = {}
        with _kept(built, ours):
            hidden = packed.hidden_states(ids, *rest)
        ours["lm_head"] = finished_logits(hidden @ packed.head.weight.T, packed.logits_rule)
        start = 0
        for piece in block:
            number += 1
            theirs = _stock_outputs(built, piece, exact=False)
            exact = _stock_outputs(built, piece, exact=True) if by_float32 else {}
            own = {name: output[:, start : start + len(piece)] for name, output in ours.items()}
            if found := _differing(own, theirs, exact, ERROR.get(built.dtype, ERROR_HALF)):
                return f"{found} (document {number} of the comparison)"
            start += len(piece)
    return None


def _stock_outputs(built: BuiltModel, piece: Piece, *, exact: bool) -> Outputs:
    """Of a document alone; `exact`: in float32 arithmetic."""
    outputs: Outputs = {}
    dtype, arithmetic = (torch.float32, float32_arithmetic) if exact else (built.dtype, nullcontext)
    with stock_code(built.peft) as stock, arithmetic(stock), _kept(built, outputs):
        logits = stock_logits(stock, piece[None], dtype=dtype)
    return outputs | {"lm_head": logits}  # last, as it is called


def _differing(ours: Outputs, theirs: Outputs, exact: Outputs, limit: float) -> str | None:
    for name, expected in theirs.items():
        if name not in ours:
            return f"{name} is called by stock code alone"
        found = ours[name]
        if found.shape != expected.shape:
            return f"{name}: {list(found.shape)} packed, {list(expected.shape)} in stock code"
        error = _error(found, expected)
        if error <= limit:
            continue
        if name not in exact:
            return f"{name}, {error:.1e} apart, at most {limit:.0e}"
        packed, stock = _error(found, exact[name]), _error(expected, exact[name])
        if not packed <= RATIO * stock:
            return f"{name}, {error:.1e} apart, at most {limit:.0e}, or {packed:.1e} and {stock:.1e} from float32"
    return None


def _error(output: Tensor, expected: Tensor) -> float:
    """Relative."""
    output, expected = output.float(), expected.float()
    return float((output - expected).norm() / expected.norm().clamp(min=1e-30))


@contextmanager
def _kept(built: BuiltModel, outputs: Outputs) -> Iterator[None]:
    """Inside, `outputs` gets the first output of embedding, rotary table, layers, their modules and the final norm."""
    packed, handles = built.packed, []

    def hook(name: str) -> Callable[..., None]:
        def keep(module: Any, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and tensor.ndim == 3:
                outputs.setdefault(name, tensor.detach().clone())

        return keep

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        outputs.setdefault("the input of model.layers.0 (made of the embedding)", hidden.detach().clone())
        tables = kwargs.get("position_embeddings")
        if isinstance(tables, tuple):
            outputs.setdefault("model.rotary_emb", torch.cat(tables, -1).detach().clone())

    handles.append(packed.embed.register_forward_hook(hook("model.embed_tokens")))
    handles.append(packed.body.layers[0].register_forward_pre_hook(enter, with_kwargs=True))
    for number, layer in enumerate(packed.body.layers):
        for name, child in layer.named_children():
            handles.append(child.register_forward_hook(hook(f"model.layers.{number}.{name}")))
        handles.append(layer.register_forward_hook(hook(f"model.layers.{number}")))
    handles.append(packed.body.norm.register_forward_hook(hook("model.norm")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
