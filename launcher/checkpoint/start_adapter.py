"""Begins a run with the weights of an adapter that exists (lora.start_from). Imports no torch before it loads them."""

import hashlib
import json
import os
import shlex
from pathlib import Path
from typing import Any

from launcher.checkpoint.files import damaged_adapter
from launcher.checkpoint.plain_lora import TOKEN_ROWS, beyond_plain, token_indices
from launcher.credentials import masked, shortened
from launcher.errors import RecipeError
from launcher.recipe.field_types import HUB_ID
from launcher.recipe.lora_section import LoraSection, fused_targets

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_SETTINGS = {  # of adapter_config.json: our key, and what PEFT takes where there is none
    "r": ("r", 8), "lora_alpha": ("alpha", 8), "use_rslora": ("rslora", False), "use_dora": ("dora", False),
    "rank_pattern": ("rank_pattern", {}), "alpha_pattern": ("alpha_pattern", {}),
}  # fmt: skip
UNCHANGED_BASE = (True, False, None, "gaussian", "orthogonal", "eva")  # init_lora_weights that leave the base as it is
DIGITS_SHOWN = 12  # digits of a digest
VALUE_SHOWN = 60  # characters of a setting


def check_start(lora: LoraSection) -> str:
    """What is known of `lora.start_from` without the network. Raises RecipeError unless it is a hub id, or a folder of
    an adapter with the settings of `lora`."""
    start = str(lora.start_from)
    if not os.path.isdir(start):
        if "/" in start and HUB_ID.fullmatch(start):
            owner = start.partition("/")[0]
            if owner != "runs" and not os.path.isdir(owner):
                return f"{start} of the hub"
            raise RecipeError(  # a slip in a path
                f"lora.start_from must be a folder or a hub id; there is no folder {start}, and {owner} names folders, "
                f"not an owner.\nName an adapter's folder; for a hub id, start where no folder is called {owner}."
            )
        raise RecipeError(
            f"lora.start_from must be a folder or a hub id; {start} is neither. Name an adapter's folder."
        )
    check_settings(lora, _settings(Path(start) / CONFIG, start))
    if not (Path(start) / WEIGHTS).is_file():
        raise RecipeError(
            f"lora.start_from must hold its weights as {WEIGHTS}; {start} has none. A .bin file is not read: it may "
            "run code.\nLoad it with PEFT and save it again (save_pretrained)."
        )
    return start


def check_settings(lora: LoraSection, settings: dict[str, Any]) -> None:
    """Raise RecipeError for an adapter that is not plain LoRA on the base as it is, or naming every setting in which
    the adapter and the recipe differ, and the keys that agree."""
    _check_plain(str(lora.start_from), settings)
    here = {key: getattr(lora, key) for key, _ in ADAPTER_SETTINGS.values()}
    there = {key: settings.get(name) or default for name, (key, default) in ADAPTER_SETTINGS.items()}
    targets = settings.get("target_modules")
    if isinstance(targets, list) and not lora.layers and not settings.get("layers_to_transform"):
        words = [target for target in targets if "." not in target]
        if words == targets and not any(t.startswith("re:") or t == "all-linear" for t in lora.targets):
            here["targets"], there["targets"] = sorted(fused_targets({*words}, lora.targets)), sorted(words)
    if (numbers := settings.get("layers_to_transform")) not in (None, []):
        here["layers"] = sorted({number for chosen in lora.chosen_layers for number in chosen})
        there["layers"] = sorted({*numbers}) if isinstance(numbers, list) else [numbers]
    ids = sorted({index for of_module in token_indices(settings).values() for index in of_module})
    if len(ids) != len(lora.trainable_tokens):  # which texts these are is known once the tokenizer is (`load_start`)
        here["trainable_tokens"], there["trainable_tokens"] = lora.trainable_tokens, ids
    if differ := [key for key in here if here[key] != there[key]]:
        found = "; ".join(f"lora.{key} is {here[key]} here, {there[key]} there" for key in differ)
        remedy = " ".join(shlex.quote(f"lora.{key}={json.dumps(there[key])}") for key in differ)
        raise RecipeError(f"the settings must be those of lora.start_from={lora.start_from}; {found}.\nSet {remedy}")


def _check_plain(start: str, settings: dict[str, Any]) -> None:
    """Raise RecipeError for an adapter that means something else than scale * B A, or DoRA, on the base as it is."""
    if found := beyond_plain(settings):
        names = ", ".join(f"{name}={shortened(json.dumps(value), VALUE_SHOWN)}" for name, value in found.items())
        raise RecipeError(
            f"lora.start_from must be plain LoRA; {start} has {names}.\n"
            "Merge it into its base with PEFT (merge_and_unload), and train on the result."
        )
    init = settings.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in UNCHANGED_BASE:
        raise RecipeError(
            "lora.start_from must have begun as default, gaussian, orthogonal or eva, which leave the base as it is; "
            f"{start} has init_lora_weights={shortened(json.dumps(init), VALUE_SHOWN)}.\n"
            "Save it in PEFT with path_initial_model_for_weight_conversion, which makes pissa, olora and corda plain "
            "LoRA, or merge it there (merge_and_unload) and train on the result."
        )


def load_start(model: Any, lora: LoraSection, *, base: str) -> str:
    """Overwrite the adapter of the PeftModel `model` with the weights of `lora.start_from`; returns a note that says
    which they are. `base`: what the model was loaded from. Raises RecipeError where they are not this model's,
    CheckpointError where their file is damaged."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    start = str(lora.start_from)
    settings = _settings(_file(start, CONFIG), start)
    check_settings(lora, settings)
    file = _file(start, WEIGHTS)
    try:
        saved = load_file(file)
    except (SafetensorError, OSError) as error:
        raise damaged_adapter(file, error, instead="another adapter (of a run: checkpoints/step-N/adapter)") from None
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    _order_tokens(saved, settings, model.peft_config["default"].to_dict(), start)
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (saved, own)]
    if shapes[0] != shapes[1]:
        name = sorted(dict(shapes[0].items() ^ shapes[1].items()))[0]
        raise RecipeError(
            f"lora.start_from must hold the tensors of this run's adapter; {start} differs in {name}: "
            f"{shapes[0].get(name, 'none')} there, {shapes[1].get(name, 'none')} here.\n"
            "Name the base that it was trained on, and its lora.targets and lora.layers."
        )
    set_peft_model_state_dict(model, saved)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:DIGITS_SHOWN]
    before = str(settings.get("base_model_name_or_path"))
    other = "" if before == base else f"; this run's base is {base}, to which it was not fitted"
    return masked(f"the adapter starts from {start} (sha256 {digest}), trained on {before}{other}")


def _order_tokens(saved: dict[str, Any], there: dict[str, Any], here: dict[str, Any], start: str) -> None:
    """Put the rows of trained tokens in this run's order. Raises RecipeError for other tokens than this run's."""
    ids_there, ids_here = token_indices(there), token_indices(here)
    if {name: {*ids} for name, ids in ids_there.items()} != {name: {*ids} for name, ids in ids_here.items()}:
        raise RecipeError(
            f"lora.trainable_tokens must be the tokens of lora.start_from={start}; by module they are {ids_here} here, "
            f"{ids_there} there.\nName those ids. A model whose head is not tied to its embedding trains both."
        )
    for name in [name for name in saved if name.endswith(TOKEN_ROWS)]:
        module = name.removesuffix(TOKEN_ROWS).rpartition(".")[2]
        if len(saved[name]) == len(ids_there.get(module, ())):  # else it is refused by its shape or its name
            saved[name] = saved[name][[ids_there[module].index(index) for index in ids_here[module]]]


def _settings(file: Path, start: str) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise RecipeError(f"lora.start_from must be a LoRA adapter in PEFT's layout; {start} has no {CONFIG} of one.")
    return settings


def _file(start: str, name: str) -> Path:
    """The file `name` of a folder, or of a repository of the hub: downloaded where it is not in the local cache."""
    if os.path.isdir(start):
        return Path(start) / name
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(start, name))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(
            f"lora.start_from must be an adapter; {start} has no {name} that can be read: {reason}"
        ) from None
