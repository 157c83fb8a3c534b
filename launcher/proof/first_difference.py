"""Where the packed forward first computes something else than stock code: module by module, in the order of calls."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from launcher.model.build import BuiltModel
from launcher.model.logits import finished_logits
from launcher.proof.stock import Piece, packed_arguments, stock_code, stock_logits

ERROR = {torch.float32: 1e-4}  # of a module's output, relative
ERROR_HALF = 0.05

Outputs = dict[str, Tensor]  # by module, [1, S, width]


@torch.no_grad()
def first_difference(built: BuiltModel, blocks: Sequence[Sequence[Piece]]) -> str | None:
    """The first module whose output for a document of `blocks` is another one in stock code, with the figures; None
    where all outputs are equal."""
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
            theirs: Outputs = {}
            with stock_code(built.peft) as stock, _kept(built, theirs):
                theirs["lm_head"] = stock_logits(stock, piece[None], dtype=built.dtype)
            theirs["lm_head"] = theirs.pop("lm_head")  # last, as it is called
            own = {name: output[:, start : start + len(piece)] for name, output in ours.items()}
            if found := _differing(own, theirs, ERROR.get(built.dtype, ERROR_HALF)):
                return f"{found} (document {number} of the comparison)"
            start += len(piece)
    return None


def _differing(ours: Outputs, theirs: Outputs, limit: float) -> str | None:
    for name, expected in theirs.items():
        if name not in ours:
            return f"{name} is called by stock code alone"
        found = ours[name]
        if found.shape != expected.shape:
            return f"{name}: {list(found.shape)} packed, {list(expected.shape)} in stock code"
        expected = expected.float()
        error = float((found.float() - expected).norm() / expected.norm().clamp(min=1e-30))
        if not error <= limit:
            return f"{name}, {error:.1e} apart, at most {limit:.0e}"
    return None


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
