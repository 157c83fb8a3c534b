"""Loads a run as stock code does: the base in NF4 by transformers and bitsandbytes, the adapter by PEFT."""

import gc
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, GenerationConfig

from launcher.checkpoint.bundle import faults_of
from launcher.checkpoint.files import damaged_adapter
from launcher.data.chat.encode import Encoder
from launcher.data.chat.stops import stops_of_answers
from launcher.errors import CheckpointError, RecipeError
from launcher.export.place import ADAPTER_FILES, RunPlace
from launcher.model.build import DTYPES, choose_dtype
from launcher.model.load import is_prequantised, load_base, load_config, load_generation, load_tokenizer, stop_ids_of
from launcher.records.run import Verdict
from launcher.runtime.ranks import RankInfo
from launcher.train.inputs import choose_device


@dataclass(frozen=True)
class OpenedRun:
    """A run without its weights."""

    place: RunPlace
    source: str  # of the base: folder or hub id
    config: Any
    tokenizer: Any  # with the chat template that was trained with
    device: torch.device
    dtype: torch.dtype  # computes as the run did, where the device can
    generation: GenerationConfig  # the base's own; generate and export stop at `stop_ids`
    notes: tuple[str, ...] = ()

    @property
    def stop_ids(self) -> list[int]:
        return stop_ids_of(self.generation)

    @property
    def prequantised(self) -> bool:
        return is_prequantised(self.config)


def open_run(place: RunPlace, source: str, rank_info: RankInfo) -> OpenedRun:
    """Read config and tokenizer; no weights. Raises RecipeError and CheckpointError where they are not whole."""
    if place.adapter.parent.parent.name == "checkpoints" and (faults := list(faults_of(place.adapter.parent))):
        raise CheckpointError(f"a checkpoint must be whole; {place.adapter.parent} is not: {'; '.join(faults)}.")
    _check_adapter(place.adapter)
    model, device = place.recipe.model, choose_device(rank_info)
    config = load_config(source, model)
    tokenizer = _tokenizer(place, source)
    dtype, notes = DTYPES[place.dtype], list(place.notes)
    try:
        choose_dtype(place.dtype, device)
    except RecipeError:
        dtype = choose_dtype("auto", device)
        notes.append(f"the run computed in {place.dtype}, which this device lacks: {str(dtype)[6:]} is used")
    generation = load_generation(source, model, config)
    generation.eos_token_id = stops_of_answers(tokenizer, stop_ids_of(generation))
    return OpenedRun(place, source, config, tokenizer, device, dtype, generation, tuple(notes))


def load_trained(run: OpenedRun, adapter: Path | None = None) -> tuple[PeftModel, Verdict | None]:
    """The trained model in eval mode, and whether its base is what the files hold. `adapter`: another folder than the
    run's. Raises RecipeError where the base cannot be loaded."""
    recipe, folder = run.place.recipe, adapter or run.place.adapter
    base = load_base(
        run.source,
        run.config,
        quant=recipe.quant,
        dtype=run.dtype,
        device=run.device,
        revision=recipe.model.revision,
    )
    base.model.generation_config = run.generation
    return PeftModel.from_pretrained(base.model, str(folder)).eval(), base.verdict


def generation_settings(stop_ids: Sequence[int], **settings: Any) -> GenerationConfig:
    """Settings of stock `generate` that end an answer at these tokens."""
    pad = stop_ids[0] if stop_ids else 0
    return GenerationConfig(eos_token_id=list(stop_ids) or None, pad_token_id=pad, **settings)


def free_memory(device: torch.device) -> None:
    """Return what is no longer referenced to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _check_adapter(folder: Path) -> None:
    """Raise CheckpointError unless the adapter's files can be read; no weight is."""
    config, weights = (folder / name for name in ADAPTER_FILES)
    file = config
    try:
        json.loads(config.read_text(encoding="utf-8"))
        file = weights
        with safe_open(weights, framework="pt"):  # a file that is cut off is refused by its header
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged_adapter(file, error, instead="a checkpoint (run=…/checkpoints/step-N)") from None


def _tokenizer(place: RunPlace, source: str) -> Any:
    """The saved one; a checkpoint alone has none, and gets the base's with the template of the recipe."""
    for folder in (place.adapter, place.folder / "adapter"):
        if (file := folder / "tokenizer_config.json").is_file():
            try:
                return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
            except Exception as error:  # what is wrong with a file may show as any error
                with suppress(ValueError):
                    json.loads(file.read_text(encoding="utf-8"))
                    file = folder / "tokenizer.json"
                raise damaged_adapter(file, error) from None  # the checkpoints' is this one too
    tokenizer = load_tokenizer(source, place.recipe.model, stand_in=Path())
    Encoder(tokenizer, data=place.recipe.data)  # puts data.template on it
    return tokenizer
