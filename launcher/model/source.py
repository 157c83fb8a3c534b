"""A model's config and tokenizer, read before its weights and without running any code that comes with it."""

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer

from launcher.errors import RecipeError
from launcher.recipe.schema import ModelSection


def load_config(source: str, model: ModelSection) -> Any:
    """The transformers config at `source`. Raises RecipeError for a model that wants its own code to run."""
    try:
        return AutoConfig.from_pretrained(source, revision=_revision(source, model), trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise RecipeError(
            f"model {source!r} must load without remote code and with a config transformers knows:\n"
            f"{str(error).strip().splitlines()[0][:200]}"
        ) from None


def check_weights(source: str) -> None:
    """Raise RecipeError unless a local folder holds safetensors files that open; a hub id is left to the download."""
    if not os.path.isdir(source):
        return
    files = sorted(Path(source).glob("*.safetensors"))
    if not files:
        raise RecipeError(
            f"a model folder must hold its weights as safetensors; {source} has none.\n"
            "Complete the checkpoint, or try the architecture alone with model.init=random."
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise RecipeError(f"weights must be whole; {file} is not: {error}\nCopy or download it again.") from None


def load_tokenizer(source: str, model: ModelSection, *, stand_in: Path) -> Any:
    """The model's tokenizer; with random weights and none beside the config, the one at `stand_in`."""
    if model.init == "random" and os.path.isdir(source) and not (Path(source) / "tokenizer_config.json").is_file():
        source = str(stand_in)
    try:
        return AutoTokenizer.from_pretrained(source, revision=_revision(source, model), trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0][:200]
        raise RecipeError(
            f"model {source!r} must come with a tokenizer: {first_line}\nPut its tokenizer files into the folder."
        ) from None


def _revision(source: str, model: ModelSection) -> str | None:
    return None if os.path.isdir(source) else model.revision
