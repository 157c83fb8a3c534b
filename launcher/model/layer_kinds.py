"""What a model's config says of its decoder layers: rotary tables, sliding windows, caps of the attention scores.

Read by the names that transformers' configs have in common, where the architecture's own code reads them
(`stock_setting`). `config` is transformers', or has only what config.json says: what that leaves out is not checked
here. Imports no torch.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from launcher.errors import RecipeError
from launcher.model.families import stock_setting

# Rotary tables of these kinds are the same for every document within `max_position_embeddings`, so one table serves the
# whole run: `dynamic` changes its base only beyond them.
STATIC_ROPE = ("default", "linear", "llama3", "yarn", "dynamic")
LAYER_TYPES = ("full_attention", "sliding_attention")
DROPOUTS = ("attention_dropout", "resid_pdrop")  # inside a decoder layer


class LayerKind(NamedTuple):
    """What layers of one kind have in common. `table`: the layer type whose rotary table it is, "" where all layers
    have one table. `window`: tokens that a token sees, itself included; None where it sees its whole document."""

    table: str
    window: int | None


class AttentionNeeds(NamedTuple):
    """What a path of attention must be able to do besides causal attention within documents."""

    window: bool = False
    softcap: bool = False


def layer_kinds(config: Any, *, max_length: int) -> tuple[LayerKind, ...]:
    """The kind of each layer. A window that no document of `max_length` tokens fills counts as none."""
    types = stock_setting(config, "layer_types") or ["sliding_attention"] * config.num_hidden_layers
    window = stock_setting(config, "sliding_window")
    binding = window if window is not None and window < max_length else None
    tables = set(types) if len(list(_rope_settings(config))) > 1 else ()
    return tuple(
        LayerKind(one if one in tables else "", binding if one == "sliding_attention" else None) for one in types
    )


def attention_needs(config: Any, *, max_length: int) -> AttentionNeeds:
    return AttentionNeeds(
        window=any(kind.window is not None for kind in layer_kinds(config, max_length=max_length)),
        softcap=stock_setting(config, "attn_logit_softcapping") is not None,
    )


def mask_count(config: Any, *, max_length: int) -> int:
    """Different masks of a micro batch, where attention reads masks."""
    return len({kind.window for kind in layer_kinds(config, max_length=max_length)})


def check_layers(config: Any, *, max_length: int) -> None:
    """Raise RecipeError for dropout inside layers, attention to later tokens, layers of other types, and rotary
    embeddings that depend on the length of a document."""
    for name in DROPOUTS:
        if rate := getattr(config, name, 0.0):
            raise RecipeError(
                f"packed attention and compiled layers have no dropout; the model's config sets {name}={rate}.\n"
                "Set it to 0 in the model's config.json (LoRA dropout, lora.dropout, is independent of it)."
            )
    if getattr(config, "use_bidirectional_attention", None):
        raise RecipeError("attention must be causal; this model's config sets use_bidirectional_attention.")
    window = stock_setting(config, "sliding_window")
    if window is not None and window < 1:
        raise RecipeError(f"a sliding window must hold a token or more; this model's config sets {window}.")
    others = sorted(set(stock_setting(config, "layer_types") or ()) - {*LAYER_TYPES})
    if others:
        raise RecipeError(
            f"decoder layers must be of the types {' and '.join(LAYER_TYPES)}; this model has {', '.join(others)}."
        )
    for rope in _rope_settings(config):
        _check_rope(rope, max_length=max_length)


def _rope_settings(config: Any) -> Iterator[Mapping[str, Any]]:
    """The rotary settings: one for all layers, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_type = [rope[name] for name in LAYER_TYPES if isinstance(rope.get(name), Mapping)]
    yield from by_type or [rope]


def _check_rope(rope: Mapping[str, Any], *, max_length: int) -> None:
    kind = rope.get("rope_type", "default")
    if kind == "longrope":  # one table up to this length, another beyond
        limit = rope.get("original_max_position_embeddings", max_length)
        if max_length > limit:
            raise RecipeError(
                f"longrope has one rotary table for documents of up to {limit} tokens, another for longer ones; one "
                f"run has one.\ndata.max_length is {max_length}. Set data.max_length={limit} or lower."
            )
    elif kind not in STATIC_ROPE:
        kinds = ", ".join((*STATIC_ROPE, "longrope"))
        raise RecipeError(f"rotary embeddings must be of a kind in {kinds}; this model uses {kind!r}")
