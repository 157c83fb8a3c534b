"""LoRA adapters through PEFT: its layers, its file layout, with the forward of ops/qlora_linear.py.

PEFT's own forward casts activations to the adapters' fp32 and multiplies there, or relies on autocast. Each adapted
layer therefore becomes an instance of a subclass here. A subclass, not a replaced method: PEFT's saving and loading,
isinstance checks and torch.compile's guards see one ordinary class for every layer.
"""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from launcher.errors import RecipeError
from launcher.ops.qlora_linear import qlora_linear
from launcher.recipe.schema import LoraSection

ADAPTER = "default"


class _ExplicitCast:
    """The forward shared by both kinds of adapted layer; x [..., D] -> [..., O]."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return qlora_linear(
            x,
            self.base_layer,
            self.lora_A[ADAPTER].weight,
            self.lora_B[ADAPTER].weight,
            scaling=self.scaling[ADAPTER],
            dropout=getattr(self.lora_dropout[ADAPTER], "p", 0.0),
        )


class QLoraLinear(_ExplicitCast, PeftLinear):
    """LoRA on an unquantised linear."""


class QLoraLinear4bit(_ExplicitCast, PeftLinear4bit):
    """LoRA on a 4-bit linear."""


EXPLICIT_CAST: dict[type, type] = {PeftLinear: QLoraLinear, PeftLinear4bit: QLoraLinear4bit}


def stock_lora(model: PreTrainedModel, lora: LoraSection, *, seed: int) -> PeftModel:
    """Freeze the base and add PEFT's own adapters, drawn from `seed`. The targets have passed `check_targets`."""
    torch.manual_seed(seed)
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int, any number scales
            lora_dropout=lora.dropout,
            target_modules=list(lora.targets),
            task_type="CAUSAL_LM",
        ),
        adapter_name=ADAPTER,
    )


def attach_lora(model: PreTrainedModel, lora: LoraSection, *, seed: int) -> PeftModel:
    """Freeze the base and add fp32 adapters with explicit casts, drawn from `seed`. See `stock_lora`."""
    adapted = stock_lora(model, lora, seed=seed)
    for module in adapted.modules():
        if hasattr(module, "lora_A"):
            module.__class__ = EXPLICIT_CAST[type(module)]
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise AssertionError(f"{name} is {parameter.dtype}: LoRA masters are fp32")
    # One mode for the run: train() and eval() are guarded on, and bitsandbytes repacks weights in eval on some CPUs.
    # Dropout follows the gradient mode instead (ops/qlora_linear.py).
    return adapted.train()


def check_targets(model: PreTrainedModel, targets: tuple[str, ...] | list[str]) -> None:
    """Raise RecipeError naming every LoRA target that is not a linear of the decoder layers."""
    layers: nn.Module = model.model.layers
    linears = {name.rsplit(".", 1)[-1] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    unmatched = [t for t in targets if t not in linears]
    if unmatched:
        raise RecipeError(
            f"lora.targets must name linear layers of the decoder; {', '.join(unmatched)} matched nothing.\n"
            f"This model has: {', '.join(sorted(linears))}."
        )
