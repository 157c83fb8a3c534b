"""Tells from an adapter's settings whether its update is scale * B A, or DoRA's, and nothing else, beside the rows of
trained tokens. Imports no torch."""

from collections.abc import Mapping
from typing import Any

PLAIN_SETTINGS = {  # what they hold does not change the forward pass, or is compared elsewhere
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
    "trainable_token_indices",
}  # fmt: skip
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"  # behind the name of the module, in PEFT's files
NOTHING_SET: tuple[Any, ...] = (None, False, "none", "", [])


def beyond_plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an adapter_config.json that make it more than plain LoRA: each name that is not known here counts
    as one, so that what a later PEFT adds is not passed over."""
    return {name: value for name, value in settings.items() if name not in PLAIN_SETTINGS and value not in NOTHING_SET}


def token_indices(settings: Mapping[str, Any]) -> dict[str, list[int]]:
    """The ids of trained tokens in an adapter_config.json, by the module whose rows are trained: as PEFT reads a list,
    those of the embedding."""
    given = settings.get("trainable_token_indices")
    by_module = given if isinstance(given, dict) else {"embed_tokens": given}
    return {str(name).rpartition(".")[2]: [*ids] for name, ids in by_module.items() if ids}
