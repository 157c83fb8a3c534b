"""The model as a user without this project would train it: stock transformers, PEFT and bitsandbytes modules.

It shares the loading of the base and the adapters' names with the compiled model, and none of what computes:
transformers' own forward and "sdpa" attention, PEFT's own LoRA layers, autocast where the compute dtype is a half one.
mode=parity measures by it; so parity judges neither how weights are loaded nor what the data is.

Two of them: `stock_model` computes in the run's dtype; with `reference=True` it computes in fp32 on the base that the
quantised weights stand for, each weight dequantised to fp32 without a rounding in between.

Letters: D documents of a group, L positions of its longest.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from launcher.data.pack.micro_batch import IGNORE
from launcher.model.build import build_base
from launcher.model.lora import stock_lora
from launcher.recipe.schema import Recipe

Document = tuple[Tensor, Tensor]  # ids and labels, [L] each


def stock_model(
    recipe: Recipe, source: str, config: Any, *, dtype: torch.dtype, device: torch.device, reference: bool = False
) -> PeftModel:
    """The base of `recipe` with PEFT's adapters. `reference`: in fp32, on the dequantised base of the dtype's run.

    On a GPU its layers are checkpointed, as runs on small cards are: it costs time and changes no result.
    """
    base = build_base(recipe, source, config, dtype=dtype, device=device)
    if reference:
        _dequantise(base)
    base.set_attn_implementation("sdpa")
    if device.type == "cuda":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return stock_lora(base, recipe.lora, seed=recipe.train.seed).train()


def stock_loss(model: PeftModel, documents: Sequence[Document], *, dtype: torch.dtype) -> Tensor:
    """Summed loss of the supervised tokens of `documents`, fp32 scalar; autocast to `dtype` where it is a half one.

    Each document is a row of its own and positions begin at 0. They are padded on the right, where causal attention
    hides the padding from every token, so that no mask is needed and none can be wrong.
    """
    ids = pad_sequence([ids for ids, _ in documents], batch_first=True)  # [D, L]
    labels = pad_sequence([labels for _, labels in documents], batch_first=True, padding_value=IGNORE)
    with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=ids).logits
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def supervised_documents(input_ids: Tensor, labels: Tensor, document_ids: Tensor) -> list[Document]:
    """The documents of packed rows ([B, S] each, labels shifted already) that have a target; padding has none."""
    found = []
    for ids, targets, numbers in zip(input_ids, labels, document_ids, strict=True):
        sizes = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        pieces = zip(ids.split(sizes), targets.split(sizes), strict=True)
        found += [(piece, wanted) for piece, wanted in pieces if bool((wanted != IGNORE).any())]
    return found


def grouped(documents: Sequence[Document], *, positions: int) -> Iterator[list[Document]]:
    """The documents by falling length, in groups that fill at most `positions`, padding included; at least one each."""
    group: list[Document] = []
    for document in sorted(documents, key=lambda document: -len(document[0])):
        if group and len(group[0][0]) * (len(group) + 1) > positions:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def _dequantise(base: PreTrainedModel) -> None:
    """Every 4-bit linear becomes a plain one, in place, and everything computes in fp32."""
    for parent in list(base.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Linear4bit):
                setattr(parent, name, _plain(module))
    for name in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer"):  # PEFT and transformers go by these
        setattr(base, name, None)
    if hasattr(base.config, "quantization_config"):
        del base.config.quantization_config
    base.float()


def _plain(module: Linear4bit) -> nn.Linear:
    weight: Any = module.weight
    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32  # else each weight would be rounded to the dtype that it had before it was quantised
    with torch.device("meta"):
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    plain.weight = nn.Parameter(dequantize_4bit(weight.data, state), requires_grad=False)
    plain.bias = module.bias
    return plain
