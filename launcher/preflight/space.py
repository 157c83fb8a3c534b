"""What a run needs of the disks and of the device's memory, from the sizes of its model."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from launcher.checkpoint.bundle import bundles_of
from launcher.checkpoint.folder import RunFolder
from launcher.compile.inductor_cache import VARIABLE
from launcher.errors import LESS_MEMORY, DiskError, MemoryExhausted, RecipeError
from launcher.memory.forecast import Shapes, forecast, optimizer_bytes
from launcher.memory.ledger import MIB, Ledger
from launcher.memory.policy import choose_policy
from launcher.model.attention import MASKED, choose_attention
from launcher.model.build import choose_dtype
from launcher.model.families import head_width
from launcher.model.layer_kinds import attention_needs, mask_count
from launcher.model.logits import logit_bytes, logits_rule
from launcher.model.lora_targets import adapted_linears
from launcher.model.sizes import adapter_parameters, kept_by_adapters, step_sizes, weight_bytes
from launcher.model.weight_files import read_headers
from launcher.ops.chunk_sizes import chunk_rows
from launcher.recipe.schema import Recipe
from launcher.runtime.private_cache import private_cache

FP32 = 4  # bytes
COMPILED_CODE = 16 * MIB  # of one model and shape
FORECAST_ERROR = 0.04  # the largest that was measured (docs/memory.md)


def bundle_bytes(recipe: Recipe, trainable: int) -> int:
    """Bytes of a checkpoint: the adapter in PEFT's layout, and in the state the adapter again and its optimizer."""
    adapter = FP32 * recipe.lora.rank_factor
    return round(trainable * (2 * adapter + optimizer_bytes(recipe.train.optimizer, recipe.lora.r)))


def check_disk(recipe: Recipe, source: str, model: nn.Module, folder: RunFolder) -> str:
    """Raise DiskError unless adapter, checkpoints, a model that is not downloaded yet and compiled code have room."""
    needs: dict[int, list[tuple[str, int]]] = {}  # by file system
    free: dict[int, int] = {}
    for what, place, size in _needs(recipe, source, model, folder):
        there = nearest_folder(place)
        device = os.stat(there).st_dev
        needs.setdefault(device, []).append((f"{what} in {place}", size))
        free[device] = shutil.disk_usage(there).free
    for device, wanted in needs.items():
        total = sum(size for _, size in wanted)
        if total > free[device]:
            parts = ", ".join(f"{size / MIB:,.0f} MiB for {what}" for what, size in wanted if size)
            raise DiskError(
                f"a run needs room for its files; {parts} make {total:,} bytes, and {free[device]:,} are free.\n"
                "Free space, lower train.keep, or choose another run.output_dir."
            )
    return ", ".join(f"{size / MIB:,.0f} MiB for {what}" for wanted in needs.values() for what, size in wanted if size)


def _needs(recipe: Recipe, source: str, model: nn.Module, folder: RunFolder) -> Iterator[tuple[str, Path, int]]:
    trainable = adapter_parameters(model, recipe.lora)
    # Besides those kept: the best one, and the new one until an old one goes.
    saves = (recipe.train.keep + 2) * bundle_bytes(recipe, trainable) if recipe.train.save_every else 0
    present = sum(file.stat().st_size for bundle in bundles_of(folder.checkpoints) for file in bundle.rglob("*"))
    yield "checkpoints", folder.path, max(0, saves - present)
    yield (
        "the adapter",
        folder.path,
        FP32 * recipe.lora.rank_factor * trainable
        + sum(file.stat().st_size for file in Path(source).glob("tokenizer*")),
    )
    if recipe.compile.mode != "off" and VARIABLE in os.environ:
        yield "compiled code", Path(os.environ[VARIABLE]), COMPILED_CODE
    if recipe.model.init == "pretrained" and not os.path.isdir(source):
        from huggingface_hub.constants import HF_HUB_CACHE

        if read_headers(source, recipe.model.revision) is None:
            parameters = sum(parameter.numel() for parameter in model.parameters())
            yield f"{source}", Path(HF_HUB_CACHE), parameters * torch.bfloat16.itemsize


def nearest_folder(path: Path) -> Path:
    """The path, or the nearest one above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def check_folders() -> str:
    """Raise RecipeError without a temporary folder. Without a private cache folder a run goes on, and says so."""
    try:
        with tempfile.TemporaryFile():
            pass
    except OSError as error:
        raise RecipeError(
            f"temporary files need a folder that can be written; {error.strerror}: {error.filename or tempfile.tempdir}"
            "\nSet TMPDIR to one."
        ) from None
    folder, unusable = private_cache("inductor")
    cache = f"{folder} {unusable}: temporary ones are used" if unusable else str(folder.parent)
    return f"temporary files in {tempfile.gettempdir()}, caches in {cache}"


def check_memory(recipe: Recipe, config: Any, model: nn.Module, device: torch.device) -> str:
    """Raise MemoryExhausted unless the forecast fits into what the device has free. The widths of bucketed blocks are
    known once the data is read: until then the weights and the optimizer alone are counted, as on a CPU."""
    shapes, held_mib = planned_shapes(recipe, config, model, device)
    free_mib = Ledger(device).free_mib()
    room_mib = psutil.virtual_memory().available / MIB if free_mib is None else free_mib
    if free_mib is None:
        peak_mib = held_mib + (2 * FP32 + shapes.state) * shapes.trainable / MIB
        kept = "weights, adapters and optimizer"
    else:
        policy = choose_policy(recipe, shapes, held_mib=held_mib, free_mib=free_mib - held_mib)
        peak_mib, kept = forecast(shapes, policy.kept, held_mib=held_mib), f"a peak with activations {policy.name}"
    found = f"{peak_mib:,.0f} MiB for {kept}, {room_mib:,.0f} MiB free on {device}"
    if peak_mib * (1 - FORECAST_ERROR) > room_mib:
        raise MemoryExhausted(
            f"a run must fit into the free memory of its device; {found}.\nEnd what else uses it. {LESS_MEMORY}"
        )
    return found


def planned_shapes(recipe: Recipe, config: Any, model: nn.Module, device: torch.device) -> tuple[Shapes, float]:
    """The sizes of a step on full blocks, and MiB of weights and adapters."""
    dtype = choose_dtype(recipe.model.dtype, device)
    packed, head = recipe.data.batching == "packed", head_width(config)
    needs = attention_needs(config, max_length=recipe.data.max_length)
    attention, _ = choose_attention(recipe.model.attention, device, dtype, alone=not packed, head=head, needs=needs)
    width = 1 if recipe.data.batching == "bucketed" else recipe.data.max_length
    tokens, trainable = recipe.train.micro_batch * width, adapter_parameters(model, recipe.lora)
    itemsize = logit_bytes(logits_rule(config), dtype)
    chunk = chunk_rows([tokens], config.vocab_size, recipe.memory.loss_chunk_mib, itemsize=itemsize)
    adapted = [one.linear for one in adapted_linears(model, recipe.lora).values()]
    shapes = Shapes(
        tokens=tokens,
        masked=width if attention in MASKED else 0,
        masks=mask_count(config, max_length=recipe.data.max_length),
        state=optimizer_bytes(recipe.train.optimizer, recipe.lora.r),
        by_adapters=kept_by_adapters(adapted, recipe.lora) // config.num_hidden_layers,
        **step_sizes(config, attention=attention, dtype=dtype, loss_chunk=chunk, trainable=trainable),
    )
    adapters = FP32 * recipe.lora.rank_factor * trainable
    return shapes, (weight_bytes(model, recipe.quant, dtype) + adapters) / MIB
