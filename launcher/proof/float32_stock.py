"""Stock code in float32 arithmetic on the weights as they are in memory: no second copy of them.

Nothing but the arithmetic changes. Embeddings are cast as they are read; norms, biases and other small tensors stand in
fp32 for the time; a quantised weight is dequantised to fp32, as it is used; an unquantised one is cast some rows at a
time, forward and backward; of trained tokens the fp32 rows are used. Layers are checkpointed, so that a document keeps
one layer's activations at a time. A layer that casts its output to something else ends it: that would be no reference.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CAST_ROWS = 4096  # of an unquantised weight, in fp32 at once


@contextmanager
def float32_arithmetic(stock: PeftModel) -> Iterator[None]:
    """Inside, the model of `stock_code` computes logits and gradients in fp32, without autocast. Afterwards all is as
    before, bit by bit. Its layers raise TypeError where what they give is not fp32."""
    base: Any = stock.get_base_model()
    modules: list[Any] = list(base.modules())
    with ExitStack() as stack:
        for module in modules:
            kept: Any = getattr(module, "weight", None)
            if isinstance(module, Linear4bit):
                stack.enter_context(_replaced(kept.quant_state, "dtype", torch.float32))
                stack.enter_context(_replaced(module, "compute_dtype", torch.float32))
            elif isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(_cast_output).remove)
            elif issubclass(type(module), TrainableTokensLayer):
                module.forward = partial(_with_rows, module)
                stack.callback(delattr, module, "forward")
            elif type(module).forward is nn.Linear.forward:
                module.forward = partial(_linear, module)
                stack.callback(delattr, module, "forward")
            else:
                kept = None
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor is not kept and tensor.dtype in (torch.bfloat16, torch.float16):
                    stack.enter_context(_replaced(tensor, "data", tensor.data.float()))
        for layer in base.model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
            stack.callback(delattr, layer, "forward")
            stack.callback(layer.register_forward_hook(_check_output).remove)
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _cast_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.float()


def _check_output(layer: nn.Module, args: Any, output: Any) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.dtype != torch.float32:
        raise TypeError(f"{type(layer).__name__} gives {str(hidden.dtype).removeprefix('torch.')}")


def _with_rows(layer: Any, x: Tensor) -> Tensor:
    """The embedding or head of `layer` with its trained rows; ids x [...] -> [..., D], or x [..., D] -> [..., V]."""
    [name], base = layer.active_adapters, layer.base_layer
    rows, ids = layer.trainable_tokens_delta[name], torch.tensor(layer.token_indices[name], device=x.device)
    y: Tensor = base(x)
    if not isinstance(base, nn.Embedding):
        return y.index_copy_(-1, ids, x.float() @ rows.T)
    found = x[..., None] == ids  # [..., n]
    padding = (ids == (-1 if base.padding_idx is None else base.padding_idx)).nonzero()  # as torch's embedding
    values = F.embedding(found.int().argmax(-1), rows, padding_idx=int(padding[0]) if len(padding) else None)
    return torch.where(found.any(-1)[..., None], values * float(getattr(base, "embed_scale", 1.0)), y)


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """x [..., D] -> [..., O], fp32."""
    if linear.weight.dtype == torch.float32:  # of the adapters
        return nn.Linear.forward(linear, x)
    product: Tensor = _Product.apply(x.float(), linear.weight)
    return product if linear.bias is None else product + linear.bias


class _Product(torch.autograd.Function):
    """x W^T in fp32, where W [O, D] is frozen and in half precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return torch.cat([x @ rows.float().T for rows in weight.split(CAST_ROWS)], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        [dy] = gradients
        parts = zip(dy.split(CAST_ROWS, -1), ctx.weight.split(CAST_ROWS), strict=True)
        return torch.stack([part @ rows.float() for part, rows in parts]).sum(0), None
