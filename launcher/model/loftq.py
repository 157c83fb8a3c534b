"""lora.init=loftq: the adapter begins as what NF4 has taken from the weights.

    W - NF4(W)  ≈  scaling * B A        A [r, D], B [O, r]: the leading r singular values of the left side, each matrix
                                        with their square roots

One iteration of LoftQ (arXiv:2310.08659, algorithm 1), with the base as it is: more iterations would quantise another
matrix. PEFT's `replace_lora_weights_loftq` computes the same product, but leaves the scaling out: with alpha = 2 r its
start is as far from W as the base, on the other side.
"""

from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor

from launcher.errors import RecipeError
from launcher.model.lora import ADAPTER, nf4_of
from launcher.model.low_rank import NEGLIGIBLE, leading_svd
from launcher.model.weight_files import Headers
from launcher.ops.nf4 import plain_merged_weight
from launcher.recipe.schema import Recipe
from launcher.records.run import Verdict


def check_loftq(recipe: Recipe, *, prequantised: bool) -> None:
    """Raise RecipeError unless this run rounds the weights of a checkpoint to NF4."""
    reasons = {  # each with its remedy
        ("quant.type=none rounds nothing", "Set quant.type=nf4"): recipe.quant.type == "none",
        (
            "model.init=random has no files",
            "Name a checkpoint in model.name with model.init=pretrained",
        ): recipe.model.init == "random",
        (
            "this checkpoint holds them rounded already",
            "Name the unquantised checkpoint in model.name with quant.type=nf4",
        ): recipe.model.init == "pretrained" and prequantised,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        reason, remedy = found[0]
        raise RecipeError(
            f"lora.init=loftq needs the weights as they are before they are rounded to NF4; {reason}.\n"
            f"{remedy}, or use another start, such as lora.init=default."
        )


@torch.no_grad()
def loftq_start(peft: PeftModel, headers: Headers, *, dtype: torch.dtype, seed: int) -> Verdict:
    """Write A, B and DoRA's magnitudes of every adapted linear, whose weight is in the files of `headers`; returns
    whether each weight that a run in `dtype` then multiplies by is nearer to that of the files than NF4 is. Holds a few
    fp32 copies of one weight at a time.

    Raises RecipeError, naming the linear, where NF4 changes its weight in fewer directions than its rank."""
    nearer, squares = [], torch.zeros(2, dtype=torch.float64)
    base: Any = peft.get_base_model()
    for name, module in base.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        key = f"{name}.weight"
        with safe_open(headers[key].file, framework="pt") as file:
            weight = file.get_tensor(key).to(module.base_layer.weight.device, torch.float32)
        errors = _start(module, key, weight, dtype=dtype, seed=seed)
        nearer.append(bool(errors[1] < errors[0]))
        squares += errors.double().cpu()
    before, after = squares.tolist()
    taken = 1 - after / before if before else 0.0
    evidence = f"{sum(nearer)} of {len(nearer)} weights; the square sum of the errors of NF4 is {taken:.1%} smaller"
    return Verdict("start is nearer to the base's files", all(nearer), evidence)


def _start(module: Any, name: str, weight: Tensor, *, dtype: torch.dtype, seed: int) -> Tensor:
    """Write the adapter of one linear, whose `weight` [O, D] is called `name` in the files; returns the square sums of
    the errors of its NF4 and of the start, [2]."""
    base, scaling = nf4_of(module.base_layer), module.scaling[ADAPTER]
    a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    error = weight - plain_merged_weight(base, None, None, 1.0, weight.shape)
    u, s, v = leading_svd(error, min(len(a), *weight.shape), seed=seed)
    if (found := int((s > NEGLIGIBLE * weight.norm()).sum())) < len(a):  # where both are zero, neither would ever learn
        raise RecipeError(
            f"lora.init=loftq needs weights that NF4 changes in as many directions as the rank; {name} is changed in "
            f"{found}, its rank is {len(a)}.\nLower lora.r, or use lora.init=default."
        )
    root = (s / scaling).sqrt()
    a.copy_(root[:, None] * v)
    b.copy_(u * root)
    start = plain_merged_weight(base, a, b, scaling, weight.shape, dtype)
    if module.use_dora[ADAPTER]:  # else the rows would be scaled back to the lengths of NF4's
        module.lora_magnitude_vector[ADAPTER].weight.copy_(torch.linalg.vector_norm(start, dim=1))
    return torch.stack([error.square().sum(), (weight - start).square().sum()])
