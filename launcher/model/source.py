"""Where a model comes from: a local folder, a hub id, or an architecture that ships with the recipes.

Everything here happens before weights are read, so that a wrong name ends the run early and leaves nothing behind.
"""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from transformers import AutoConfig, AutoTokenizer

from launcher.errors import RecipeError
from launcher.recipe.schema import ModelSection

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_TIMEOUT_S = 5.0  # for the one small file that tells whether the hub can be reached


def locate(model: ModelSection, architectures: Path) -> str:
    """`model.name` -> an absolute folder or a hub id that is cached or reachable.

    With `model.init=random` only a config is wanted: a folder's, or one shipped under `architectures` whose name is
    the last part of the hub id. Raises RecipeError with the way out.
    """
    name = model.name
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RecipeError(f"a model folder must hold config.json; {folder} does not. Name the checkpoint's folder.")
        return str(folder.resolve())
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        raise RecipeError(
            f"model.name must be a hub id or an existing folder; there is no folder {str(folder)!r}.\n"
            "Check the path, or name a hub id such as unsloth/Llama-3.2-1B-Instruct."
        )
    if model.init == "random":
        shipped = architectures / name.rsplit("/", 1)[-1]
        if (shipped / "config.json").is_file():
            return str(shipped.resolve())
        known = ", ".join(sorted(p.parent.name for p in architectures.glob("*/config.json")))
        raise RecipeError(
            f"model.init=random needs a folder with config.json or a shipped architecture; {name!r} is neither.\n"
            f"Shipped: {known}."
        )
    _require_hub(name, model.revision)
    return name


def _require_hub(name: str, revision: str | None) -> None:
    """Raise RecipeError, within seconds, unless the hub id is in the local cache or the hub answers for it."""
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    try:
        hf_hub_download(name, "config.json", revision=revision, etag_timeout=HUB_TIMEOUT_S)
    except Exception as error:  # the hub client has a dozen kinds, from DNS to licence gates; all mean "not to be had"
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(
            f"model {name!r} is not in the local cache and could not be had from the hub: {first_line[:160]}\n"
            f"Online: check the name, the revision and your login. Offline: copy the checkpoint here and set "
            f"model.name=/path/to/folder,\nor try the architecture alone with model.init=random."
        ) from None


def load_config(source: str, model: ModelSection) -> Any:
    """The transformers config at `source`. Raises RecipeError for a model that wants its own code to run."""
    try:
        return AutoConfig.from_pretrained(source, revision=_revision(source, model), trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise RecipeError(
            f"model {source!r} must load without remote code and with a config transformers knows:\n"
            f"{str(error).strip().splitlines()[0][:200]}"
        ) from None


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
