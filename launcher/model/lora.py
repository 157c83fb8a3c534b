"""LoRA adapters with PEFT's layers and file layout, and the forward of ops/qlora_linear.py.

PEFT's own forward casts activations to the adapters' fp32 and multiplies there, or relies on autocast. So each adapted
layer, and each 4-bit linear without an adapter, becomes an instance of a subclass from here. Subclasses rather than
replaced methods: PEFT's saving and loading, isinstance checks and torch.compile's guards see one ordinary class for all
layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor
from transformers import PreTrainedModel

from launcher.errors import RecipeError
from launcher.model.lora_start import ADAPTER, start_factors, start_from_weights
from launcher.model.lora_targets import module_names
from launcher.model.token_ids import peft_indices
from launcher.ops.dora_linears import dora_linears
from launcher.ops.nf4 import BLOCK, Nf4, plain_merged_weight
from launcher.ops.qlora_linear import frozen_linear, lora_update, qlora_linear
from launcher.recipe.lora_section import LoraSection


class QLoraLinear(PeftLinear):
    """LoRA on an unquantised linear; x [..., D] -> [..., O]."""

    def forward(self: Any, x: Tensor) -> Tensor:
        dropout = getattr(self.lora_dropout[ADAPTER], "p", 0.0)
        dropped = F.dropout(x, dropout, training=True) if dropout > 0 and torch.is_grad_enabled() else x
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        start = start_factors(self)
        return self.base_layer(x) + lora_update(dropped, a, b, scaling=self.scaling[ADAPTER], start=start)


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
            start=start_factors(self),
        )
        return y if self.base_layer.bias is None else y + self.base_layer.bias


class QDoraLinear(QLoraLinear):
    """DoRA on an unquantised linear; x [..., D] -> [..., O]."""

    def forward(self: Any, x: Tensor) -> Tensor:
        base, scaling = self.base_layer, self.scaling[ADAPTER]
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        with torch.no_grad():
            norms = torch.linalg.vector_norm(base.weight + scaling * (b @ a), dim=1, dtype=torch.float32)
        dropped = _dropped(self, x)
        y = F.linear(dropped, base.weight) + lora_update(dropped, a, b, scaling=scaling)
        y = (y * (self.lora_magnitude_vector[ADAPTER].weight / norms)).to(x.dtype)
        if dropped is not x:
            y = y + F.linear(x - dropped, base.weight)
        return y if base.bias is None else y + base.bias


class QDoraLinear4bit(QLoraLinear4bit):
    """DoRA on a 4-bit linear; x [..., D] -> [..., O]."""

    def forward(self: Any, x: Tensor) -> Tensor:
        base, dropped = nf4_of(self.base_layer), _dropped(self, x)
        y = dora_linears(
            dropped,
            [base],
            [self.lora_A[ADAPTER].weight],
            [self.lora_B[ADAPTER].weight],
            [self.lora_magnitude_vector[ADAPTER].weight],
            scaling=self.scaling[ADAPTER],
        )
        if dropped is not x:  # PEFT: the base's own part is not dropped
            y = y + frozen_linear(x - dropped, base, out_features=self.out_features)
        return y if self.base_layer.bias is None else y + self.base_layer.bias


def _dropped(linear: Any, x: Tensor) -> Tensor:
    """The input of an adapter: x itself without dropout or gradients."""
    dropout = getattr(linear.lora_dropout[ADAPTER], "p", 0.0)
    return F.dropout(x, dropout, training=True) if dropout > 0 and torch.is_grad_enabled() else x


class FrozenLinear4bit(Linear4bit):
    """A 4-bit linear without an adapter; x [..., D] -> [..., O]."""

    def forward(self, x: Tensor) -> Tensor:
        y = frozen_linear(x, nf4_of(self), out_features=self.out_features)
        return y if self.bias is None else y + self.bias


OURS: dict[tuple[type, bool], type] = {  # by PEFT's class, and whether it is DoRA
    (PeftLinear, False): QLoraLinear,
    (PeftLinear, True): QDoraLinear,
    (PeftLinear4bit, False): QLoraLinear4bit,
    (PeftLinear4bit, True): QDoraLinear4bit,
}


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


def stock_lora(model: PreTrainedModel, lora: LoraSection, *, seed: int, token_ids: Sequence[int] = ()) -> PeftModel:
    """Freeze the base and add PEFT's own adapters, drawn from `seed`. Targets have passed `check_targets`; `token_ids`
    are those of lora.trainable_tokens."""
    assert len(token_ids) == len(lora.trainable_tokens), "each trained token has an id"
    torch.manual_seed(seed)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int, any number scales
            lora_dropout=lora.dropout,
            target_modules=module_names(model, lora),
            use_rslora=lora.rslora,
            use_dora=lora.dora,
            init_lora_weights="gaussian" if lora.init == "gaussian" else True,
            rank_pattern=dict(lora.rank_pattern),
            alpha_pattern=dict(lora.alpha_pattern),
            trainable_token_indices=peft_indices(model.config, token_ids),
            task_type="CAUSAL_LM",
        ),
        adapter_name=ADAPTER,
    )
    if lora.init == "orthogonal":
        layers: list[Any] = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            orthogonal_start(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
    if lora.starts_from_weights:
        start_from_weights(adapted, lora.init, _plain_weight, seed=seed)
    for name, parameter in adapted.named_parameters():  # what train/optim.py reads
        if parameter.requires_grad and lora.plus_ratio != 1 and ".lora_" in name and ".lora_A." not in name:
            parameter.rate_factor = lora.plus_ratio  # type: ignore[attr-defined]
        if parameter.requires_grad and ".lora_" not in name:  # rows of tokens: towards zero is not towards the base
            parameter.decays = False  # type: ignore[attr-defined]
    return adapted


def _plain_weight(base_layer: Any) -> Tensor:
    """The weight [O, D] of a linear, fp32; dequantised if it is NF4."""
    shape = torch.Size((base_layer.out_features, base_layer.in_features))
    if isinstance(base_layer, Linear4bit):
        return plain_merged_weight(nf4_of(base_layer), None, None, 1.0, shape)
    return base_layer.weight.detach().float()


@torch.no_grad()
def orthogonal_start(a: Tensor, b: Tensor) -> None:
    """Draw A [r, D] and B [O, r], neither of them zero, in two orthogonal halves of r dimensions, so that B A is zero.
    It is PEFT's `orthogonal`, which itself refuses a base that is not floating point."""
    (rank, width), out = a.shape, b.shape[0]
    basis = torch.linalg.qr(torch.randn(rank, rank))[0]
    a.copy_((torch.randn(width, rank // 2) @ basis[0::2]).T / 10)
    b.copy_(torch.randn(rank // 2, out).T @ basis[1::2] / 10)


def attach_lora(model: PreTrainedModel, lora: LoraSection, *, seed: int, token_ids: Sequence[int] = ()) -> PeftModel:
    """As `stock_lora`, but with this module's forward: fp32 adapters and explicit casts."""
    adapted = stock_lora(model, lora, seed=seed, token_ids=token_ids)
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A"):
            module.__class__ = OURS[type(module), lora.dora]
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
