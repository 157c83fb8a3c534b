"""Where `model.name` is: a local folder, a hub id, or an architecture that ships with the recipes.

This is checked before torch is imported and before weights are read: a wrong name ends the run within seconds and
leaves nothing behind. huggingface_hub is imported only for a name that is no folder.
"""

import errno
import os
from pathlib import Path

from launcher.credentials import shortened
from launcher.errors import GGUF_REMEDY, RecipeError
from launcher.recipe.field_types import HUB_ID
from launcher.recipe.hub_request import HUB_TIMEOUT_S, answered
from launcher.recipe.schema import ModelSection

CONFIG_TIMEOUT_S = 7.0  # for the hub's answer and config.json together


def locate(model: ModelSection, architectures: Path) -> str:
    """`model.name` -> an absolute folder, or a hub id that is cached or reachable.

    With `model.init=random` only a config is needed: a folder's, or one shipped under `architectures` whose name is
    the last part of the hub id.

    Raises:
        RecipeError: it is nowhere; the message says what to do.
    """
    name = model.name
    if name.lower().endswith(".gguf"):
        raise RecipeError(f"model.name must be a hub id or a folder with safetensors; got {name!r}. {GGUF_REMEDY}")
    folder = Path(os.path.expanduser(name))  # leaves the ~ of a user that is not known
    try:
        if folder.is_dir():
            _check_folder(folder)
            return str(folder.resolve())
    except OSError as error:
        raise RecipeError(f"a model folder must be readable; {error}. Correct its permissions.") from None
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        raise RecipeError(
            f"model.name must be a hub id or an existing folder; there is no folder {str(folder)!r}.\n"
            "Check the path, or name a hub id such as unsloth/Llama-3.2-1B-Instruct."
        )
    if model.init == "random":
        return _shipped(name, architectures)
    _require_hub(name, model.revision)
    return name


def _check_folder(folder: Path) -> None:
    """Raise RecipeError for a folder that is no model's, OSError for one that cannot be read."""
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        remedy = "It is a LoRA adapter's: name its base." if adapter else "Name the checkpoint's folder."
        remedy = GGUF_REMEDY if any(folder.glob("*.gguf")) and not adapter else remedy
        raise RecipeError(f"a model folder must hold config.json; {folder} does not. {remedy}")
    for path in folder.iterdir():
        if path.is_file() and not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        if path.exists() and not (path.is_file() or path.is_dir()):  # who reads a pipe or a device may wait for ever
            raise RecipeError(f"a model folder must hold files and folders; {path} is neither. Replace it by a file.")


def config_file(source: str, revision: str | None) -> Path | None:
    """config.json of a located model, where this machine has it."""
    if Path(source).is_dir():
        return Path(source) / "config.json"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def _shipped(name: str, architectures: Path) -> str:
    folder = architectures / name.rsplit("/", 1)[-1]
    if (folder / "config.json").is_file():
        return str(folder.resolve())
    names = ", ".join(sorted(path.parent.name for path in architectures.glob("*/config.json")))
    raise RecipeError(
        f"model.init=random needs a folder with config.json or a shipped architecture; {name!r} is neither.\n"
        f"Shipped: {names}."
    )


def _require_hub(name: str, revision: str | None) -> None:
    """Have config.json in the local cache. Raises RecipeError, within seconds, if the hub does not answer for it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    def ask() -> None:
        # One request first: the client's download retries six times for half a minute.
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=HUB_TIMEOUT_S)
        hf_hub_download(name, "config.json", revision=revision)

    try:
        if not config_file(name, revision):
            answered(ask, timeout_s=CONFIG_TIMEOUT_S)
    except Exception as error:  # the client has a dozen kinds, from DNS to licence gates; all mean "not to be had"
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise RecipeError(
            f"model {name!r} is not in the local cache and could not be had from the hub: {shortened(reason, 160)}\n"
            "Online: check the name, the revision and your login.\n"
            "Offline: copy the checkpoint here and set model.name=/path/to/folder,\n"
            "or try the architecture alone with model.init=random."
        ) from None
