"""Starts of the adapters that are taken from the base's own weight W: PiSSA and OLoRA.

    PiSSA    W = U S V^T     A0 = sqrt(S_r / s) V_r^T     B0 = U_r sqrt(S_r / s)      arXiv:2404.02948, section 3
    OLoRA    W = Q R         A0 = R_r                     B0 = Q_r                    arXiv:2406.01775, section 2

Both train W - s B0 A0 + s B A from A = A0 and B = B0 on. Elsewhere the residual W - s B0 A0 becomes the base, and NF4
must round it anew: the adapter then fits another base than the one there is. Here W is the weight as it is (NF4:
dequantised), nothing is rounded anew, and

    W + s (B A - B0 A0)

is trained: the base itself at the start, with the gradients of the above at every step. A0 and -B0 are a second adapter
of PEFT, START, frozen and active beside the trained one, so that stock PEFT computes the same model. What is saved is
one plain adapter of rank 2r, as PEFT itself converts PiSSA and OLoRA, but in the factors that ops/qlora_linear.py
computes with, [A; A - A0] and [B - B0, B0]. The product is that of PEFT's [A; A0] and [B, -B0], which loses the digits
that cancel where an adapter is rounded to half precision: with A and B moved by 1e-4, half of the update in bf16.

Letters: O out-features, D in-features, r rank, s the scale of the update.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from launcher.errors import RecipeError
from launcher.model.low_rank import NEGLIGIBLE, leading_svd
from launcher.recipe.lora_section import NITER

ADAPTER, START = "default", "start"  # PEFT's names of the trained and of the frozen one


SPARE = 8  # columns beyond the rank: the largest values of a trained weight fall, unlike those of rounding errors


@torch.no_grad()
def start_from_weights(adapted: PeftModel, init: str, weight_of: Callable[[Any], Tensor], *, seed: int) -> None:
    """Put A0 and B0 into the adapter and, with -B0, into a frozen one beside it. `weight_of(base_layer)`: fp32 [O, D].
    `seed`: of the SVD of large weights."""
    peft: Any = adapted
    plain = {"init_lora_weights": False, "trainable_token_indices": None}  # rows of tokens begin as the base's own
    peft.add_adapter(START, replace(peft.peft_config[ADAPTER], **plain))
    peft.base_model.set_adapter([ADAPTER, START])  # both are active
    layers: dict[str, Any] = {n: module for n, module in peft.get_base_model().named_modules() if _is_adapted(module)}
    for layer_name, layer in layers.items():
        rank, scaling = layer.r[ADAPTER], layer.scaling[ADAPTER]
        a, b = first_factors(weight_of(layer.base_layer), rank, scaling, init, seed=seed)
        if (found := int((b.norm(dim=0) > 0).sum())) < rank:  # where A and B are both zero, neither would ever learn
            raise RecipeError(
                f"lora.init={init} needs weights with as many components as the rank; {layer_name} has {found}, its "
                f"rank is {rank}.\nLower lora.r, give it a rank of its own in lora.rank_pattern, or use "
                "lora.init=default."
            )
        for name, sign in ((ADAPTER, 1), (START, -1)):
            layer.lora_A[name].weight.copy_(a)
            layer.lora_B[name].weight.copy_(sign * b)
    for parameter in start_parameters(adapted).values():
        parameter.requires_grad_(False)


def _is_adapted(module: Any) -> bool:
    return isinstance(module, LoraLayer)


def first_factors(weight: Tensor, rank: int, scaling: float, init: str, *, seed: int) -> tuple[Tensor, Tensor]:
    """A0 [r, D] and B0 [O, r] of `weight` [O, D] by a value of lora.init. What PiSSA finds no component for is zero."""
    if init == "olora":
        q = torch.linalg.qr(weight[:, :rank])[0]  # these columns alone decide Q_r
        return q.T @ weight, q
    _, _, iterations = init.partition(NITER)
    u, s, v = leading_svd(weight, rank, seed=seed, iterations=int(iterations) if iterations else None, spare=SPARE)
    root = torch.where(s > NEGLIGIBLE * s[0], s / scaling, 0.0).sqrt()
    return root[:, None] * v, u * root


def start_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen A0 and -B0 by name; none where the adapter does not start from the base's weights."""
    return {name: parameter for name, parameter in model.named_parameters() if f".{START}." in name}


def start_factors(layer: Any) -> tuple[Tensor, ...]:
    """A0 [r, D] and -B0 [O, r] of an adapted linear, if it has them."""
    return (layer.lora_A[START].weight, layer.lora_B[START].weight) if START in layer.lora_A else ()


def joined_halves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of both adapters by the names of the model's parameters -> those of one of rank 2r, by the names of
    ADAPTER's: [A; A - A0], [B - B0, B0]. What has no start, the rows of trained tokens, is as it is."""
    starts = {name.replace(f".{START}.", f".{ADAPTER}."): t for name, t in tensors.items() if f".{START}." in name}
    joined = {}
    for name, tensor in tensors.items():
        if name in starts and ".lora_A." in name:
            joined[name] = torch.cat([tensor, tensor - starts[name]])
        elif name in starts:
            joined[name] = torch.cat([tensor + starts[name], -starts[name]], 1)
        elif f".{START}." not in name:
            joined[name] = tensor
    return joined


def trained_half(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A and B, and what has no start, of the tensors of `joined_halves`, by their names; B up to its last bit."""
    trained = dict(saved)
    for name, tensor in saved.items():
        if ".lora_A." in name:
            trained[name] = tensor.chunk(2)[0]
        elif ".lora_B." in name:
            first, last = tensor.chunk(2, 1)
            trained[name] = first + last
    return trained


def doubled_settings(config: LoraConfig) -> dict[str, Any]:
    """Settings of adapter_config.json with which an adapter of twice the rank has the same scale."""
    factor = math.sqrt(2) if config.use_rslora else 2
    return {
        "r": 2 * config.r,
        "lora_alpha": factor * config.lora_alpha,
        "rank_pattern": {pattern: 2 * rank for pattern, rank in (config.rank_pattern or {}).items()},
        "alpha_pattern": {pattern: factor * alpha for pattern, alpha in (config.alpha_pattern or {}).items()},
    }
