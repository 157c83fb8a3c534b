"""What config.json alone tells of a model, checked before torch is imported: the architecture and its sizes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from launcher.errors import RecipeError
from launcher.model.families import FAMILIES
from launcher.model.family_choice import family_of
from launcher.model.layer_kinds import DROPOUTS
from launcher.model.quantised_checkpoints import check_quantisation
from launcher.model.untrainable import refuse_untrainable
from launcher.recipe.schema import QuantSection

LARGEST = {  # by key: no model comes near; a larger value would take minutes to fail
    "num_hidden_layers": 1_000,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 2**16),
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 2**24),
    "max_position_embeddings": 2**28,
}
LARGEST_MODEL = 2 * 10**12  # weights
LARGEST_FILE = 2**24  # bytes of config.json
CHECKED_BY_FAMILY = (*DROPOUTS, "max_position_embeddings")  # and rope
OLD_ROPE = {"su": "longrope"}  # names that transformers still reads
ROPE_LIMIT = "original_max_position_embeddings"


def check_config_file(path: Path, *, max_length: int, auto: bool = False, quant: QuantSection | None = None) -> None:
    """Raise RecipeError unless a model of a supported family (`auto`: or of one without a row) can be built of the
    config.json at `path`, and its checkpoint is quantised as `quant` says, if given, or not at all.

    What the file leaves to transformers' defaults is checked later, by `family_of` of the whole config.
    """
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ValueError(f"{size:,} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"config.json must be readable JSON; {path}: {error}. Copy or download it again.") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise RecipeError(f"config.json must name the architecture as model_type; {path} does not. Complete it.")
    _check_sizes(config, path)
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    known = {key: config[key] for key in CHECKED_BY_FAMILY if config.get(key) is not None}
    if isinstance(rope, dict):
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        known["rope_parameters"] = {"rope_type": OLD_ROPE.get(kind, kind)}
        limit = rope.get(ROPE_LIMIT, config.get(ROPE_LIMIT))
        if isinstance(limit, int):
            known["rope_parameters"][ROPE_LIMIT] = limit
    if config["model_type"] not in FAMILIES:
        refuse_untrainable(config["model_type"], config)
    family_of(SimpleNamespace(model_type=config["model_type"], **known), max_length=max_length, auto=auto)
    if quant is not None:
        check_quantisation(config, quant)


def _check_sizes(config: dict[str, Any], path: Path) -> None:
    """Raise RecipeError unless the sizes are whole numbers that fit together."""
    sizes = {key: config[key] for key in LARGEST if config.get(key) is not None}
    for key, size in sizes.items():
        if type(size) is not int or not 1 <= size <= LARGEST[key]:
            raise _wrong(path, f"{key} must be a whole number from 1 to {LARGEST[key]:,}; it is {size!r}")
    hidden, heads = sizes.get("hidden_size", 0), sizes.get("num_attention_heads", 1)
    groups, width = sizes.get("num_key_value_heads", 1), sizes.get("head_dim", hidden / heads)
    if heads % groups:
        rule = "num_attention_heads must be a multiple of num_key_value_heads"
        raise _wrong(path, f"{rule}; they are {heads} and {groups}")
    if width % 2:
        rule = "rotary embeddings need an even head_dim, which is hidden_size / num_attention_heads if not given"
        raise _wrong(path, f"{rule}; it is {width:g}")
    of_layer = hidden * (2 * heads * width + 3 * sizes.get("intermediate_size", 0))  # q and o; gate, up and down
    weights = hidden * sizes.get("vocab_size", 0) + of_layer * sizes.get("num_hidden_layers", 0)
    if weights > LARGEST_MODEL:
        raise _wrong(path, f"a model has at most {LARGEST_MODEL:,} weights; by its sizes this one has {weights:,.0f}")


def _wrong(path: Path, problem: str) -> RecipeError:
    return RecipeError(f"{problem}.\nCorrect {path}, or copy or download it again.")
