"""The model as a user without this project would train it: stock transformers, PEFT and bitsandbytes modules.

With the compiled model it shares the loading of the base and the names of the adapters, and nothing that computes. So
mode=parity, which compares the two, checks neither how weights are loaded nor what the data is.

Packed blocks are taken apart: each document becomes a sequence that begins at position 0. Sequences are padded on the
right, where causal attention hides the padding from every token: no mask is needed, so none can be wrong.

Letters: D documents of a group, L tokens of its longest.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from launcher.checkpoint.adapter import saved_parameters
from launcher.data.loader import StepBatch
from launcher.data.pack.micro_batch import IGNORE, MicroBatch
from launcher.model.build import build_base
from launcher.model.load import empty_model
from launcher.model.lora import stock_lora
from launcher.model.trained_tokens import unwrapped
from launcher.recipe.schema import Recipe

B_STD = 0.02  # of the drawn LoRA B: as large as a base weight; the update is then a few percent of the base's output
LORA_B, TOKEN_DELTA = ".lora_B.", ".trainable_tokens_delta."  # in PEFT's names
Piece = Tensor  # token ids of a document or of its beginning, int64 [L]
Adapters = dict[str, Tensor]  # by the names of parameters
IdsAndLabels = tuple[Tensor, Tensor]  # int64; labels are shifted already, IGNORE where there is no loss


@dataclass(frozen=True)
class PaddedBatch:
    """One step batch as the stock model takes it."""

    groups: tuple[IdsAndLabels, ...]  # [D, L] each
    supervised_tokens: int


def stock_model(
    recipe: Recipe,
    source: str,
    config: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    reference: bool = False,
    token_ids: Sequence[int] = (),
) -> PeftModel:
    """The base of `recipe` with PEFT's adapters, trained tokens (`token_ids`) and "sdpa" attention, for a run that
    computes in `dtype`.

    A model whose attention "sdpa" cannot compute has "eager". `reference`: all fp32, on the weights that the quantised
    ones of that run stand for. On a GPU the layers are checkpointed, as runs on small cards are: it costs time and
    changes no result.
    """
    base = build_base(recipe, source, config, dtype=dtype, device=device).model
    if reference:
        _dequantise(base)
    base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
    if device.type == "cuda":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return stock_lora(base, recipe.lora, seed=recipe.train.seed, token_ids=token_ids).train()


def is_drawn(name: str, parameter: nn.Parameter) -> bool:
    """Whether `draw_adapters` moves this parameter of PEFT's model: not the frozen B of a start."""
    return parameter.requires_grad and (LORA_B in name or TOKEN_DELTA in name)


@torch.no_grad()
def draw_adapters(model: nn.Module, *, seed: int) -> None:
    """Move by a draw what a comparison would see nothing of: LoRA B, which mostly begins at zero, and the rows of
    trained tokens, which begin as the base's own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if is_drawn(name, parameter):
            parameter.add_(torch.empty(parameter.shape).normal_(std=B_STD, generator=generator).to(parameter.device))


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of what is trained."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@torch.no_grad()
def write_adapters(model: PeftModel, adapters: Adapters) -> None:
    """Write the values of another model of the same adapters over those of `model`."""
    parameters = saved_parameters(model)
    assert parameters.keys() == adapters.keys(), "the models have the same adapters"
    for name, parameter in parameters.items():
        parameter.copy_(adapters[name])


def collate(batch: StepBatch, *, max_positions: float = math.inf, pinned: bool = False) -> PaddedBatch:
    """The documents of `batch`, grouped by length. A group has no more positions than its micro batch, padding
    included, and no more than `max_positions` unless it is a single document.

    Supervised tokens are counted here: a wrong count in the batch would scale every model's loss alike.
    """
    groups, supervised_tokens = [], 0
    for micro in batch.micro_batches:
        supervised_tokens += int((micro.labels != IGNORE).sum())
        for group in grouped(supervised_documents(micro), positions=min(micro.input_ids.numel(), max_positions)):
            ids = pad_sequence([ids for ids, _ in group], batch_first=True)
            labels = pad_sequence([labels for _, labels in group], batch_first=True, padding_value=IGNORE)
            groups.append((ids.pin_memory(), labels.pin_memory()) if pinned else (ids, labels))
    return PaddedBatch(tuple(groups), supervised_tokens)


def supervised_documents(micro: MicroBatch) -> list[IdsAndLabels]:
    """The documents of packed blocks that have a target, [L] each. Padding has none."""
    documents: list[IdsAndLabels] = []
    for ids, labels, numbers in zip(micro.input_ids, micro.labels, micro.document_ids, strict=True):
        sizes = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        pieces = zip(ids.split(sizes), labels.split(sizes), strict=True)
        documents += [piece for piece in pieces if bool((piece[1] != IGNORE).any())]
    return documents


def grouped(documents: Sequence[IdsAndLabels], *, positions: float) -> Iterator[list[IdsAndLabels]]:
    """The documents, longest first, in groups of at most `positions` once padded; at least one document each."""
    group: list[IdsAndLabels] = []
    for document in sorted(documents, key=lambda document: -len(document[0])):
        if group and len(group[0][0]) * (len(group) + 1) > positions:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def accumulate(model: Any, batch: PaddedBatch, scaler: torch.amp.GradScaler, *, dtype: torch.dtype) -> Tensor:
    """Add the gradients of the mean loss, times the scaler's scale, to `.grad`.

    Returns the loss summed over the supervised tokens, fp32 scalar.
    """
    total = torch.zeros((), device=model.device)
    for group in batch.groups:
        ids, labels = (tensor.to(model.device, non_blocking=True) for tensor in group)
        loss = summed_loss(model, ids, labels, dtype=dtype)
        total += loss.detach()
        scaler.scale(loss / max(1, batch.supervised_tokens)).backward()
    return total


def summed_loss(model: Any, ids: Tensor, labels: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Of [D, L] tokens, fp32 scalar. It ends before backward, which frees the logits."""
    logits = stock_logits(model, ids, dtype=dtype)
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def stock_logits(model: Any, ids: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Of [D, L] tokens, [D, L, V]; autocast in half precision."""
    with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits: Tensor = model(input_ids=ids).logits
    return logits


def packed_arguments(pieces: Sequence[Piece]) -> tuple[Tensor, ...]:
    """PackedCausalLM's arguments for one block of these documents, of which every token is a target."""
    ids, sizes = torch.cat(list(pieces)), [len(piece) for piece in pieces]
    labels = torch.cat([torch.cat([piece[1:], piece.new_tensor([IGNORE])]) for piece in pieces])
    positions = torch.cat([torch.arange(size, device=ids.device) for size in sizes])
    documents = torch.repeat_interleave(torch.tensor(sizes, device=ids.device)).int()
    starts = torch.tensor([0, *sizes], device=ids.device).cumsum(0).int()
    return ids[None], labels[None], positions[None], documents[None], starts


@contextmanager
def stock_code(model: PeftModel) -> Iterator[PeftModel]:
    """Inside, `model` is stock: each module is of the class that transformers, PEFT or bitsandbytes gave it, its layers
    have the settings of newly built ones, and attention is transformers' "eager"."""
    base: Any = model.get_base_model()
    attention = base.config._attn_implementation
    ours = [(module, type(module)) for module in model.modules() if _is_ours(type(module))]
    changed = [(module, name, getattr(module, name), value) for module, name, value in _changed_settings(base)]
    try:
        for module, name, _, value in changed:
            setattr(module, name, value)
        for module, own in ours:
            module.__class__ = next(one for one in own.__mro__ if not _is_ours(one))
        base.set_attn_implementation("eager")
        yield model
    finally:
        base.set_attn_implementation(attention)
        for module, own in ours:
            module.__class__ = own
        for module, name, own_value, _ in changed:
            setattr(module, name, own_value)


def _changed_settings(base: Any) -> Iterator[tuple[Any, str, Any]]:
    """The numbers, names and flags in the decoder's modules that differ from those of the model of the same config
    newly built: (module, name, value there). Linears are PEFT's and bitsandbytes' to change."""
    new: Any = empty_model(copy.deepcopy(base.config))
    for path, fresh in new.model.named_modules():
        if isinstance(fresh, nn.Linear):
            continue
        module = unwrapped(base.model.get_submodule(path))
        for name, value in vars(fresh).items():
            plain = isinstance(value, int | float | str | None) and name != "training" and not name.startswith("_")
            if plain and getattr(module, name) != value:
                yield module, name, value


def _is_ours(module_type: type) -> bool:
    return module_type.__module__.startswith("launcher.")


def _dequantise(base: PreTrainedModel) -> None:
    """Make every 4-bit linear a plain fp32 one, in place, and let everything compute in fp32."""
    for parent in list(base.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Linear4bit):
                setattr(parent, name, _dequantised(module))
    for name in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer"):  # PEFT and transformers look at these
        setattr(base, name, None)
    if hasattr(base.config, "quantization_config"):
        del base.config.quantization_config
    base.float()


def _dequantised(module: Linear4bit) -> nn.Linear:
    weight: Any = module.weight
    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32  # else each weight would be rounded to the dtype that it had before it was quantised
    with torch.device("meta"):
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    linear.weight = nn.Parameter(dequantize_4bit(weight.data, state), requires_grad=False)
    linear.bias = module.bias
    return linear
