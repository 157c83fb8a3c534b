"""Saves the adapter in PEFT's layout, and proves from the files that they restore what was trained."""

import hashlib
import json
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
from launcher.model.lora_start import (
    ADAPTER,
    doubled_settings,
    joined_halves,
    start_parameters,
    trained_half,
)
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
    needed = sum(parameter.nbytes for parameter in saved_parameters(model).values())
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
    model.save_pretrained(
        str(folder),
        safe_serialization=True,
        selected_adapters=[ADAPTER],
        save_embedding_layers=False,
        state_dict=_as_saved(model, tensors),
    )
    if others := _saved_settings(model):
        config = folder / "adapter_config.json"
        settings = json.loads(config.read_text(encoding="utf-8")) | others
        config.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    for file in (folder / "adapter_config.json", folder / "README.md"):  # both name the base
        file.write_text(masked(file.read_text(encoding="utf-8")), encoding="utf-8")


def holds_adapter(model: PeftModel, folder: Path) -> bool:
    """Whether the adapter in `folder` has the model's trained weights, bit for bit."""
    try:
        saved = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError):
        return False
    trained = _saved_tensors(model)
    return saved.keys() == trained.keys() and all(torch.equal(saved[name], trained[name]) for name in saved)


def prove_adapter(model: PeftModel, folder: Path, *, loss: Callable[[], float]) -> tuple[float, float]:
    """Overwrite the trained LoRA weights with those on disk; returns `loss()` before and after. The weights are equal.

    In between they are set to NaN, so that a tensor missing from the files cannot pass unnoticed. Raises
    CheckpointError where keys, settings, weights or the loss differ. The trained weights stay as they are.
    """
    parameters = trained_parameters(model)
    trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    expected, before = _saved_tensors(model), loss()
    try:
        _overwrite(parameters, {name: torch.full_like(tensor, torch.nan) for name, tensor in trained.items()})
        saved = _load(model, folder)
        after = loss()
        different = [n for n, tensor in expected.items() if n not in saved or not torch.equal(saved[n], tensor)]
        if not start_parameters(model):  # whose B is the sum of what is saved, up to its last bit
            different = different or [n for n, p in parameters.items() if not torch.equal(p, trained[n])]
        if different or not abs(after - before) <= TOLERANCE * max(1.0, abs(before)):
            raise CheckpointError(
                f"the saved adapter must give back what was trained; loss {before:.6f} became {after:.6f}, "
                f"{len(different)} of {len(expected)} tensors differ. It was removed."
            )
    finally:
        _overwrite(parameters, trained)
    return before, after


@torch.no_grad()
def _overwrite(parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def adapter_digest(model: nn.Module) -> str:
    """A digest of the adapter's parameters: names and bits."""
    digest = hashlib.sha256()
    for name, parameter in saved_parameters(model).items():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained ones, and the frozen start that is saved with them."""
    return trained_parameters(model) | start_parameters(model)


def _as_saved(model: PeftModel, tensors: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    """`tensors` as they are saved, by the names of the model's parameters; None for its own as they are. An adapter
    with a start is saved as one of twice the rank."""
    if not start_parameters(model):
        return tensors
    return joined_halves(tensors or {name: parameter.detach() for name, parameter in saved_parameters(model).items()})


def _saved_settings(model: PeftModel) -> dict[str, Any]:
    """The settings of the model's adapter that adapter_config.json holds otherwise."""
    live: Any = model.peft_config[ADAPTER]
    return doubled_settings(live) if start_parameters(model) else {}


def _saved_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """What a file of the model's adapter holds, on the CPU."""
    tensors = get_peft_model_state_dict(
        model, _as_saved(model, None), adapter_name=ADAPTER, save_embedding_layers=False
    )
    return {str(name): tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _load(model: PeftModel, folder: Path) -> dict[str, torch.Tensor]:
    """Load the trained weights; returns all tensors of the file."""
    saved, live = PeftConfig.from_pretrained(str(folder)), model.peft_config[ADAPTER]
    assert isinstance(saved, LoraConfig) and isinstance(live, LoraConfig)
    wanted = {key: getattr(live, key) for key in SAVED_SETTINGS} | _saved_settings(model)
    for key, value in wanted.items():
        if getattr(saved, key) != value:
            raise CheckpointError(
                f"adapter_config.json must say what was trained: {key} is {getattr(saved, key)!r}, "
                f"trained was {value!r}."
            )
    saved_tensors = load_file(str(folder / "adapter_model.safetensors"))
    trained = trained_half(saved_tensors) if start_parameters(model) else saved_tensors
    result: Any = set_peft_model_state_dict(model, trained, ADAPTER)
    unexpected = list(result.unexpected_keys)
    if unexpected:
        raise CheckpointError(
            f"{folder} holds {len(unexpected)} tensors that no adapter of this model has: {unexpected[0]}"
        )
    return saved_tensors
