"""Small bases of each family, and runs on them without training."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from launcher.export.load_run import OpenedRun
from launcher.export.place import RunPlace
from launcher.model.load import load_config
from launcher.recipe.schema import Recipe
from tests.conftest import TINY


def small_base(config: Any, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint with the tiny tokenizer, whose attention and MLP matter to the loss."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "base").save_pretrained(folder)
    return folder


def opened_with(source: Path, tokenizer: Any, *, stops: tuple[int, ...] = (2,)) -> OpenedRun:
    """A run on the checkpoint at `source`, without an adapter."""
    recipe = Recipe.model_validate({"model": {"name": str(source)}, "train": {"steps": 1}})
    place = RunPlace(source, source, recipe, "float32", finished=True)
    config, generation = load_config(str(source), recipe.model), GenerationConfig(eos_token_id=list(stops))
    return OpenedRun(place, str(source), config, tokenizer, torch.device("cpu"), torch.float32, generation)
