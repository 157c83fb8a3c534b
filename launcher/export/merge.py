"""Merges an adapter into its base, weight by weight: no more than one file of the result is in memory.

    W = base + scale * B A         base, A and B in fp32, the sum rounded once       A [r, D], B [O, r], W [O, D]

base is the NF4 weight dequantised, which training added the update to (ops/nf4.py), or the weight of the base's files.
Training itself rounds A and scale * B to the compute dtype first; the masters that it updates are fp32, and so is this
sum. Under DoRA each row of the sum is scaled to its magnitude. What is not quantised keeps its value, in the dtype of
the result; the rows of trained tokens take the place of those of embedding and head.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Params4bit
from huggingface_hub import split_state_dict_into_shards_factory
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from launcher.checkpoint.files import writable
from launcher.checkpoint.plain_lora import TOKEN_ROWS, beyond_plain, token_indices
from launcher.errors import DiskError, RecipeError
from launcher.export.load_run import OpenedRun
from launcher.export.place import first_start
from launcher.model.load import empty_model
from launcher.model.lora import nf4_of_weight
from launcher.model.weight_files import (
    COMPANION,
    EMBEDDING,
    HEAD,
    Headers,
    check_headers,
    expected_shapes,
    is_packed,
    linear_weights,
    read_headers,
)
from launcher.ops.nf4 import Nf4, plain_merged_weight

PEFT_PREFIX = "base_model.model."  # of PEFT's names
MAGNITUDE = "lora_magnitude_vector"
FREE_BYTES = 64 * 2**20  # for tokenizer, configs and the file system itself


class Update(NamedTuple):
    """What an adapter adds to one weight."""

    a: Tensor  # fp32 [r, D]
    b: Tensor  # fp32 [O, r]
    scale: float
    magnitude: Tensor | None  # fp32 [O], of DoRA


class RowValues(NamedTuple):
    """The rows of trained tokens, which take the place of those of one weight."""

    ids: list[int]  # n
    values: Tensor  # fp32 [n, D]


Change = Update | RowValues


@dataclass(frozen=True)
class MergePlan:
    """What is written: the weights by name with their shapes, and in which dtype."""

    run: OpenedRun
    headers: Headers
    shapes: Mapping[str, tuple[int, ...]]
    linears: frozenset[str]  # weights of the decoder's linears, which training quantised
    on: str  # "dequantised" or "original"
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize

    def stored_name(self, name: str) -> str:
        """A tied embedding may be stored as the head alone."""
        return HEAD if name == EMBEDDING and EMBEDDING not in self.headers else name


def plan_merge(run: OpenedRun, *, on: str, dtype: torch.dtype) -> MergePlan:
    """Raises RecipeError where the base's files are not the model's, or hold no original weights."""
    recipe = run.place.recipe
    if run.prequantised and on == "original":
        raise RecipeError(
            f"on=original needs the base's weights in 16 bits or more; {run.source} holds them quantised to 4 bits.\n"
            "Use on=dequantised, which is what the adapter was trained on."
        )
    if on == "original" and first_start(recipe.lora) == "loftq":
        raise RecipeError(
            "on=original adds the update to weights that were not rounded to NF4; that of lora.init=loftq makes up for "
            "the rounding, and would do so twice.\nUse on=dequantised, which is what the adapter was trained on."
        )
    headers = read_headers(run.source, recipe.model.revision, download=True)
    assert headers is not None, "downloaded"
    skeleton = empty_model(run.config)
    check_headers(headers, skeleton, prequantised=run.prequantised, double=recipe.quant.double)
    return MergePlan(run, headers, expected_shapes(skeleton), frozenset(linear_weights(skeleton)), on, dtype)


def check_space(nbytes: int, folder: Path) -> None:
    """Raise DiskError unless merged weights of so many bytes fit where `folder` will be."""
    there = writable(folder.parent)
    free, needed = shutil.disk_usage(there).free, nbytes + FREE_BYTES
    if free < needed:
        raise DiskError(
            f"the merged model needs {needed:,} bytes in {there}; {free:,} are free.\n"
            "Free space, or name another disk with to=."
        )


def read_updates(adapter: Path) -> dict[str, Change]:
    """What an adapter in PEFT's layout changes, by the name of the weight.

    Raises RecipeError for a kind of adapter that is more than scale * B A, or DoRA, beside trained tokens.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    assert isinstance(config, LoraConfig), "the trainer makes LoRA adapters"
    if found := beyond_plain(config.to_dict()):
        raise RecipeError(
            f"an adapter that is merged must be plain LoRA; that of {adapter} has "
            f"{', '.join(f'{key}={value}' for key, value in found.items())}.\nUse format=adapter."
        )
    stored = load_file(adapter / "adapter_model.safetensors")
    tensors = {name.removeprefix(PEFT_PREFIX): tensor.float() for name, tensor in stored.items()}
    names = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    parts = ("lora_A.weight", "lora_B.weight", *([MAGNITUDE] if config.use_dora else []))
    token_rows = {name.removesuffix(TOKEN_ROWS): rows for name, rows in tensors.items() if name.endswith(TOKEN_ROWS)}
    ids = token_indices(config.to_dict())
    wanted = {f"{name}.{part}" for name in names for part in parts}
    wanted |= {f"{name}{TOKEN_ROWS}" for name in token_rows if name.rpartition(".")[2] in ids}
    if unknown := tensors.keys() - wanted:
        raise RecipeError(
            f"an adapter must hold LoRA matrices and rows of tokens only; {adapter} holds {sorted(unknown)[0]} too."
        )
    if missing := ids.keys() - {name.rpartition(".")[2] for name in token_rows}:
        raise RecipeError(
            f"an adapter must hold the rows of its trained tokens; {adapter} has none of {sorted(missing)[0]}.\n"
            "Copy it again, or use another checkpoint's."
        )
    changed = {f"{name}.weight": RowValues(ids[name.rpartition(".")[2]], rows) for name, rows in token_rows.items()}
    return changed | {
        f"{name}.weight": Update(
            tensors[f"{name}.lora_A.weight"],
            tensors[f"{name}.lora_B.weight"],
            _scale(config, name),
            tensors[f"{name}.{MAGNITUDE}"] if config.use_dora else None,
        )
        for name in sorted(names)
    }


def _scale(config: LoraConfig, name: str) -> float:
    """What an update is multiplied by; PEFT's rule."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key([*ranks], name), config.r)
    alpha = alphas.get(get_pattern_key([*alphas], name), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def check_updates(plan: MergePlan, updates: Mapping[str, Change]) -> None:
    """Raise RecipeError where an update is of no weight of the base."""
    with_rows = {name for name, change in updates.items() if isinstance(change, RowValues)} & {EMBEDDING, HEAD}
    if unknown := updates.keys() - plan.linears - (with_rows & plan.shapes.keys()):
        raise RecipeError(f"an adapter must belong to its base; {plan.run.source} has no {sorted(unknown)[0]}.")


def write_merged(
    plan: MergePlan, updates: Mapping[str, Change], folder: Path, *, shard_bytes: int, progress: Callable[[int], object]
) -> list[Path]:
    """Write the merged weights into `folder`: files of at most `shard_bytes` unless a weight is larger, and an index
    where there are several. `progress` is told how many weights are done. Returns the files."""
    check_updates(plan, updates)
    sizes: dict[str, Any] = {name: math.prod(shape) * plan.dtype.itemsize for name, shape in plan.shapes.items()}
    split = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    done, files = 0, []
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            shard[name] = merged_weight(plan, name, updates.get(name)).to(plan.dtype).cpu().contiguous()
            done += 1
            progress(done)
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors lets the owner alone read it
        files.append(folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def merged_weight(plan: MergePlan, name: str, update: Change | None) -> Tensor:
    """One weight of the result, before it is rounded: fp32 on the run's device where it is changed."""
    run, shape = plan.run, torch.Size(plan.shapes[name])
    if isinstance(update, RowValues):
        return _with_rows(plan, _stored(plan, name), update)
    if name in plan.linears and plan.on == "dequantised" and run.place.recipe.quant.type != "none":
        a, b = (update.a.to(run.device), update.b.to(run.device)) if update else (None, None)
        merged = plain_merged_weight(_nf4(plan, name), a, b, update.scale if update else 1.0, shape)
        return _lengthened(merged, update)
    weight = _stored(plan, name)
    if plan.on == "dequantised":
        weight = weight.to(run.dtype)  # as training computes with it
    if update is None:
        return weight
    weight = weight.to(run.device, torch.float32)
    return _lengthened(weight.addmm_(update.b.to(run.device) * update.scale, update.a.to(run.device)), update)


def _with_rows(plan: MergePlan, weight: Tensor, rows: RowValues) -> Tensor:
    """The weight [V, D] with the trained rows in their place, fp32."""
    values = rows.values
    if plan.on == "dequantised":  # as training computes with them
        weight, values = weight.to(plan.run.dtype), values.to(plan.run.dtype)
    return weight.float().index_copy_(0, torch.tensor(rows.ids), values.float())


def _lengthened(weight: Tensor, update: Update | None) -> Tensor:
    """The fp32 weight [O, D], in place; under DoRA its rows get the lengths that were trained."""
    if update is None or update.magnitude is None:
        return weight
    return weight.mul_((update.magnitude.to(weight.device) / torch.linalg.vector_norm(weight, dim=1))[:, None])


def _nf4(plan: MergePlan, name: str) -> Nf4:
    """The weight as the run quantised it, on the run's device; or as the checkpoint came."""
    quant, device = plan.run.place.recipe.quant, plan.run.device
    if is_packed(plan.headers, name):
        keys = {key: found[2] for key in plan.headers if (found := COMPANION.fullmatch(key)) and found[1] == name}
        parts = {part: _stored(plan, key) for key, part in keys.items()}
        return nf4_of_weight(Params4bit.from_prequantized(_stored(plan, name), parts, device=device))
    weight: Any = Params4bit(
        _stored(plan, name).to(plan.run.dtype),
        requires_grad=False,
        compress_statistics=quant.double,
        quant_type=quant.type,
    )
    return nf4_of_weight(weight.to(device))  # moving a full-precision Params4bit quantises it


def _stored(plan: MergePlan, name: str) -> Tensor:
    """A tensor of the base's files. The file is closed again: what was read of it would count as this process's."""
    key = plan.stored_name(name)
    with safe_open(plan.headers[key].file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
    return tensor
