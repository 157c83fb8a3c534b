"""Small checkpoints, without a model."""

from pathlib import Path
from typing import Any

import torch

from launcher.checkpoint.bundle import write_bundle

STATE: dict[str, Any] = {
    "step": 3,
    "identity": {"lora.r": 4, "targets": ["q_proj", "k.proj"]},
    "training": {"adapters": {"layers.0.a": torch.arange(6.0).view(2, 3)}, "flag": torch.tensor(True)},
    "early_stop": {},
}


def adapter_files(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 4}')


def written(checkpoints: Path, *steps: int) -> list[Path]:
    return [write_bundle(checkpoints, {**STATE, "step": step}, step=step, adapter=adapter_files) for step in steps]
