"""Stock code in float32 arithmetic on the weights as they are in memory: no second copy of them.

Nothing but the arithmetic changes. Embeddings are cast as they are read; norms, biases and other small tensors stand in
fp32 for the time; a quantised weight is dequantised to fp32, as it is used; an unquantised one is cast some rows at a
time, forward and backward. Layers are checkpointed, so that a document keeps one layer's activations at a time.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CAST_ROWS = 4096  # of an unquantised weight, in fp32 at once


@contextmanager
def float32_arithmetic(stock: PeftModel) -> Iterator[None]:
    """Inside, the model of `stock_code` computes logits and gradients in fp32, without autocast. Afterwards all is as
    before, bit by bit."""
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
