"""Saves the adapter in PEFT's layout, and proves from the files that they restore what was trained."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from launcher.checkpoint.files import delete, sync, writing
from launcher.checkpoint.folder import RunFolder
from launcher.credentials import masked
from launcher.errors import CheckpointError, FolderError
from launcher.model.lora import ADAPTER
from launcher.records.run import Verdict

SAVED_SETTINGS = (  # which an adapter computes otherwise without
    "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "trainable_token_indices",
)  # fmt: skip
TOLERANCE = 1e-5  # the same graph on the same batch: only a weight that differs can move the loss


def save_proven(model: PeftModel, tokenizer: Any, folder: RunFolder, *, loss: Callable[[], float]) -> Verdict:
    """Save the adapter to a staging folder, prove it there, then rename it to `adapter`. An adapter whose proof fails
    is not renamed, and the verdict says why. Raises DiskError and FolderError, as `writing` does."""
    claim = "saved adapter reloads"
    staging, earlier = folder.adapter_staging, folder.path / "adapter.earlier.part"
    needed = sum(parameter.nbytes for parameter in trained_parameters(model).values())
    try:
        with writing(folder.path, what="The adapter", needed=needed):
            folder.check_in_place()
            for leftover in (staging, earlier):  # of a killed process, or a link that someone planted
                delete(leftover)
            staging.mkdir()
            save_adapter(model, tokenizer, staging)
            sync(staging)
            before, after = prove_adapter(model, staging, loss=loss)
            if folder.adapter.exists():  # of the run before it was given more steps
                folder.adapter.rename(earlier)
            staging.rename(folder.adapter)
            delete(earlier)
    except FolderError:
        raise
    except CheckpointError as error:
        return Verdict(claim, False, str(error))
    finally:
        with suppress(OSError):
            delete(staging)
    return Verdict(claim, True, f"loss {before:.6f} trained, {after:.6f} reloaded from disk")


def save_adapter(model: PeftModel, tokenizer: Any, folder: Path) -> None:
    """Adapter weights (safetensors), adapter_config.json and the tokenizer, loadable by stock PEFT from any folder."""
    save_tensors(model, None, folder)
    tokenizer.save_pretrained(str(folder))


def save_tensors(model: PeftModel, tensors: dict[str, torch.Tensor] | None, folder: Path) -> None:
    """The model's adapter in PEFT's layout, with `tensors` (by the names of its parameters) in place of its own."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False, state_dict=tensors)
    for file in (folder / "adapter_config.json", folder / "README.md"):  # both name the base
        file.write_text(masked(file.read_text(encoding="utf-8")), encoding="utf-8")


def holds_adapter(model: PeftModel, folder: Path) -> bool:
    """Whether the adapter in `folder` has the model's trained weights, bit for bit."""
    try:
        saved = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError):
        return False
    trained = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    return saved.keys() == trained.keys() and all(torch.equal(saved[name], trained[name].cpu()) for name in saved)


def prove_adapter(model: PeftModel, folder: Path, *, loss: Callable[[], float]) -> tuple[float, float]:
    """Overwrite the trained LoRA weights with those on disk; returns `loss()` before and after. The weights are equal.

    In between they are set to NaN, so that a tensor missing from the files cannot pass unnoticed. Raises
    CheckpointError where keys, settings, weights or the loss differ; the trained weights are then restored.
    """
    parameters = trained_parameters(model)
    trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    before = loss()
    try:
        _overwrite(parameters, {name: torch.full_like(tensor, torch.nan) for name, tensor in trained.items()})
        _load(model, folder)
        after = loss()
        different = [name for name, parameter in parameters.items() if not torch.equal(parameter, trained[name])]
        if different or not abs(after - before) <= TOLERANCE * max(1.0, abs(before)):
            raise CheckpointError(
                f"the saved adapter must give back what was trained; loss {before:.6f} became {after:.6f}, "
                f"{len(different)} of {len(trained)} tensors differ. It was removed."
            )
    except Exception:
        _overwrite(parameters, trained)
        raise
    return before, after


@torch.no_grad()
def _overwrite(parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def adapter_digest(model: nn.Module) -> str:
    """A digest of the trained parameters: names and bits."""
    digest = hashlib.sha256()
    for name, parameter in trained_parameters(model).items():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _load(model: PeftModel, folder: Path) -> None:
    saved, live = PeftConfig.from_pretrained(str(folder)), model.peft_config[ADAPTER]
    assert isinstance(saved, LoraConfig) and isinstance(live, LoraConfig)
    for key in SAVED_SETTINGS:
        if getattr(saved, key) != getattr(live, key):
            raise CheckpointError(
                f"adapter_config.json must say what was trained: {key} is {getattr(saved, key)!r}, "
                f"trained was {getattr(live, key)!r}."
            )
    result: Any = set_peft_model_state_dict(model, load_file(str(folder / "adapter_model.safetensors")), ADAPTER)
    unexpected = list(result.unexpected_keys)
    if unexpected:
        raise CheckpointError(
            f"{folder} holds {len(unexpected)} tensors that no adapter of this model has: {unexpected[0]}"
        )
