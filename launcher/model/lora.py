"""LoRA adapters with PEFT's layers and file layout, and the forward of ops/qlora_linear.py.

PEFT's own forward casts activations to the adapters' fp32 and multiplies there, or relies on autocast. So each adapted
layer, and each 4-bit linear without an adapter, becomes an instance of a subclass from here. Subclasses rather than
replaced methods: PEFT's saving and loading, isinstance checks and torch.compile's guards see one ordinary class for all
layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor
from transformers import PreTrainedModel

from launcher.errors import RecipeError
from launcher.model.targets import fitted_targets
from launcher.ops.nf4 import BLOCK, Nf4
from launcher.ops.qlora_linear import frozen_linear, lora_update, qlora_linear
from launcher.recipe.schema import LoraSection

ADAPTER = "default"


class QLoraLinear(PeftLinear):
    """LoRA on an unquantised linear; x [..., D] -> [..., O]."""

    def forward(self: Any, x: Tensor) -> Tensor:
        dropout = getattr(self.lora_dropout[ADAPTER], "p", 0.0)
        dropped = F.dropout(x, dropout, training=True) if dropout > 0 and torch.is_grad_enabled() else x
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        return self.base_layer(x) + lora_update(dropped, a, b, scaling=self.scaling[ADAPTER])


class QLoraLinear4bit(PeftLinear4bit):
    """LoRA on a 4-bit linear; x [..., D] -> [..., O]."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = qlora_linear(
            x,
            nf4_of(self.base_layer),
            self.lora_A[ADAPTER].weight,
            self.lora_B[ADAPTER].weight,
            scaling=self.scaling[ADAPTER],
            dropout=getattr(self.lora_dropout[ADAPTER], "p", 0.0),
        )
        return y if self.base_layer.bias is None else y + self.base_layer.bias


class FrozenLinear4bit(Linear4bit):
    """A 4-bit linear without an adapter; x [..., D] -> [..., O]."""

    def forward(self, x: Tensor) -> Tensor:
        y = frozen_linear(x, nf4_of(self), out_features=self.out_features)
        return y if self.bias is None else y + self.bias


OURS: dict[type, type] = {PeftLinear: QLoraLinear, PeftLinear4bit: QLoraLinear4bit}


def nf4_of(linear: Linear4bit) -> Nf4:
    """The tensors of a quantised linear, shared with it."""
    return nf4_of_weight(linear.weight)


def nf4_of_weight(weight: Any) -> Nf4:
    """The tensors of a quantised weight (bitsandbytes' Params4bit), shared with it."""
    packed = weight.data if weight.dtype == torch.uint8 else weight.data.view(torch.uint8)  # may be stored as bf16
    state = weight.quant_state
    second = state.state2
    scales = () if second is None else (second.absmax, second.code, state.offset)
    return Nf4(packed, state.absmax, state.code, *scales)


def stock_lora(model: PreTrainedModel, lora: LoraSection, *, seed: int) -> PeftModel:
    """Freeze the base and add PEFT's own adapters, drawn from `seed`. Targets have passed `check_targets`."""
    torch.manual_seed(seed)
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int, any number scales
            lora_dropout=lora.dropout,
            target_modules=fitted_targets(model, lora.targets),
            task_type="CAUSAL_LM",
        ),
        adapter_name=ADAPTER,
    )


def attach_lora(model: PreTrainedModel, lora: LoraSection, *, seed: int) -> PeftModel:
    """As `stock_lora`, but with this module's forward: fp32 adapters and explicit casts."""
    adapted = stock_lora(model, lora, seed=seed)
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A"):
            module.__class__ = OURS[type(module)]
        elif isinstance(module, Linear4bit):
            check_blocks(name, module)
            if not name.endswith(".base_layer"):
                module.__class__ = FrozenLinear4bit
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise AssertionError(f"{name} is {parameter.dtype}: LoRA masters are fp32")
    # Train mode throughout: torch.compile guards on the mode, and bitsandbytes repacks weights in eval on some CPUs.
    # Dropout follows the gradient mode instead (ops/qlora_linear.py).
    return adapted.train()


def check_blocks(name: str, linear: Linear4bit) -> None:
    """Raise RecipeError for a checkpoint whose blocks are not of the size that the operators use."""
    weight: Any = linear.weight
    state = weight.quant_state
    if state.blocksize != BLOCK:
        raise RecipeError(
            f"4-bit weights must be quantised in blocks of {BLOCK}; {name} of this checkpoint has {state.blocksize}.\n"
            "Name the unquantised checkpoint in model.name."
        )
