"""Saves the adapter in PEFT's layout, and proves from the files that they give back what was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from launcher.errors import CheckpointError
from launcher.model.lora import ADAPTER

TOLERANCE = 1e-5  # the same graph on the same batch: only a differing weight can move the loss


def save_adapter(model: PeftModel, tokenizer: Any, folder: Path) -> None:
    """Adapter weights (safetensors), adapter_config.json and the tokenizer, loadable by stock PEFT from any folder."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    tokenizer.save_pretrained(str(folder))


def prove_adapter(model: PeftModel, folder: Path, *, loss: Callable[[], float]) -> tuple[float, float]:
    """Overwrite the trained LoRA weights with those on disk; returns `loss()` before and after, equal weights assured.

    Between the two the weights are set to NaN, so that a tensor the files lack cannot pass unnoticed. Raises
    CheckpointError when keys, settings or the loss differ; the trained weights are then put back.
    """
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    before = loss()
    try:
        _overwrite(model, float("nan"))
        _load(model, folder)
        after = loss()
    except Exception:
        _restore(model, trained)
        raise
    wrong = [n for n, p in model.named_parameters() if n in trained and not torch.equal(p, trained[n])]
    if wrong or not abs(after - before) <= TOLERANCE * max(1.0, abs(before)):
        _restore(model, trained)
        raise CheckpointError(
            f"the saved adapter must give back what was trained; loss {before:.6f} became {after:.6f}, "
            f"{len(wrong)} of {len(trained)} tensors differ. It was removed."
        )
    return before, after


def _load(model: PeftModel, folder: Path) -> None:
    saved, live = PeftConfig.from_pretrained(str(folder)), model.peft_config[ADAPTER]
    assert isinstance(saved, LoraConfig) and isinstance(live, LoraConfig)
    for key in ("r", "lora_alpha", "lora_dropout", "target_modules"):
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


@torch.no_grad()
def _overwrite(model: PeftModel, value: float) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.fill_(value)


@torch.no_grad()
def _restore(model: PeftModel, trained: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.copy_(trained[name])
