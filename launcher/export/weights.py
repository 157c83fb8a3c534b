"""Compares the written weights with the trained model's, element by element, by bitsandbytes' and PEFT's own code."""

import copy
import json
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from launcher.export.merge import MergePlan
from launcher.model.lora import ADAPTER
from launcher.model.trained_tokens import unwrapped
from launcher.model.weight_files import listed, read_headers
from launcher.records.run import Verdict

ROUNDINGS = 0.505  # of a rounded value's own step that it may be away: half, and the error of fp32 sums
SUM_ERROR = 2e-6  # of the largest value of a weight: fp32 sums in another order, where terms cancel


@torch.no_grad()
def weights_verdict(model: PeftModel, plan: MergePlan, folder: Path) -> Verdict:
    """Whether every weight in `folder` is the base's plus the adapter's update, rounded once. Call it before the model
    computes anything: on some CPUs bitsandbytes repacks its weights then."""
    base: Any = model.get_base_model()
    headers = read_headers(str(folder), None) or {}
    wrong = [*(plan.shapes.keys() - headers.keys()), *(headers.keys() - plan.shapes.keys())]
    with ExitStack() as stack:
        opened = {h.file: stack.enter_context(safe_open(h.file, framework="pt")) for h in headers.values()}
        for name in plan.shapes.keys() & headers.keys():
            expected = trained_weight(base, name, plan).float()
            found = opened[headers[name].file].get_tensor(name).to(expected.device)
            if found.dtype != plan.dtype or found.shape != expected.shape or not is_rounded(found, expected):
                wrong.append(name)
    whole = f"{len(plan.shapes) - len(wrong)} of {len(plan.shapes)} weights are base + update, rounded once"
    return weights_are(whole, wrong)


def weights_are(compared: str, wrong: Collection[str]) -> Verdict:
    """The verdict on the written weights: what was compared, and the names of those that are not as they should be."""
    evidence = compared + (f"; not {listed(sorted(wrong))}" if wrong else "")
    return Verdict("every written weight is the trained model's", not wrong, evidence)


def adapter_verdict(trained: Path, written: Path) -> Verdict:
    """Whether an adapter's folder holds the tensors of the run's, bit for bit, and a config that scales and places them
    alike."""
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (trained, written))
    wrong = before.keys() ^ after.keys()
    wrong |= {n for n in before.keys() & after.keys() if not torch.equal(before[n], after[n])}
    configs = [
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) for folder in (trained, written)
    ]
    wrong |= {f"{key} of adapter_config.json" for key in configs[0] if configs[0][key] != configs[1].get(key)}
    return weights_are(f"{len(before)} tensors and {len(configs[0])} keys of adapter_config.json are the run's", wrong)


def trained_weight(base: Any, name: str, plan: MergePlan) -> Tensor:
    """The weight in the trained model, before it is rounded."""
    module = base.get_submodule(name.rpartition(".")[0])
    adapted = isinstance(module, LoraLayer) and name.endswith(".weight")
    if plan.on == "original":
        key = plan.stored_name(name)
        with safe_open(plan.headers[key].file, framework="pt") as file:
            weight = file.get_tensor(key).to(plan.run.device)
    else:
        layer = unwrapped(module.base_layer if isinstance(module, LoraLayer) else module)
        weight = getattr(layer, name.rpartition(".")[2])
        if isinstance(layer, Linear4bit) and name.endswith(".weight"):
            state = copy.copy(weight.quant_state)
            state.dtype = torch.float32  # else it would be rounded to the dtype that it had before
            weight = dequantize_4bit(weight.data, state)
    if isinstance(module, TrainableTokensWrapper):
        if plan.on == "original":
            weight = weight.float()
        index = torch.tensor(module.token_adapter.token_indices[ADAPTER], device=weight.device)
        rows = module.token_adapter.trainable_tokens_delta[ADAPTER].to(weight)
        return weight.index_copy(0, index, rows)
    if not adapted:
        return weight
    update = module.get_delta_weight(ADAPTER).float()
    if ADAPTER not in module.lora_magnitude_vector:
        return weight.float() + update
    dora = module.lora_magnitude_vector[ADAPTER]
    norms = dora.get_weight_norm(weight.float(), update, scaling=1)
    return (dora.weight / norms)[:, None] * (weight.float() + update)


def is_rounded(found: Tensor, expected: Tensor) -> bool:
    """Whether `found` is `expected`, in fp32, rounded to its dtype."""
    info = torch.finfo(found.dtype)
    smallest = info.tiny * info.eps  # steps between subnormal numbers
    bound = ROUNDINGS * info.eps * expected.abs() + SUM_ERROR * expected.abs().max() + smallest / 2
    return bool(((found.float() - expected).abs() <= bound).all())
