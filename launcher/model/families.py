"""The supported architectures, one entry each, with what differs between them. To add one, add an entry and
a test config (`pytest -k families`); CONTRIBUTING.md walks through it.

All of them have the modules `CausalLM.model.{embed_tokens, layers, norm, rotary_emb}` and `CausalLM.lm_head`, and
decoder layers that are called with (hidden, attention_mask=, position_embeddings=, **kwargs).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.errors import RecipeError
from launcher.model.layer_kinds import check_layers
from launcher.model.untrainable import refuse_untrainable

if TYPE_CHECKING:  # config_file.py reads FAMILIES before torch is imported
    from torch import nn

    from launcher.model.packed import Body


@dataclass(frozen=True)
class Family:
    """One architecture, known by its `config.model_type`; norms and mlp are attributes of a decoder layer."""

    model_type: str
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    mlp: str = "mlp"
    named: bool = True  # has a row here; else norms and mlp are found on the model (layer_shape.py)


SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
FAMILIES = {
    family.model_type: family
    for family in (
        Family("gemma2", norms=SANDWICH),
        Family("gemma3_text", norms=SANDWICH),
        Family("granite"),
        Family("llama"),
        Family("ministral"),
        Family("mistral"),
        Family("olmo2", norms=SANDWICH[1::2]),
        Family("phi3"),
        Family("qwen2"),
        Family("qwen3"),
        Family("smollm3"),
    )
}


def family_of(config: Any, *, max_length: int, auto: bool = False) -> Family:
    """The family of a config, after checking that the compiled forward computes what the config says. `auto`: also of
    an architecture without a row (model.family=auto), of which layer_shape.py finds the rest.

    `config` is transformers', or has only what config.json says: what that leaves out is not checked.

    Raises RecipeError for an unknown family, a length beyond the model's positions, and as `check_layers`.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        family = _without_row(config, auto=auto)
    if max_length > getattr(config, "max_position_embeddings", max_length):
        raise RecipeError(
            f"data.max_length may be at most the model's {config.max_position_embeddings} positions; "
            f"it is {max_length}. Lower data.max_length."
        )
    check_layers(config, max_length=max_length)
    return family


def _without_row(config: Any, *, auto: bool) -> Family:
    refuse_untrainable(config.model_type, config.to_dict() if hasattr(config, "to_dict") else vars(config))
    if not auto:
        known = ", ".join(sorted(FAMILIES))
        raise RecipeError(
            f"model architectures supported are {known}; this model is {config.model_type!r}.\n"
            "model.family=auto tries it: it is trained if it is found equal to stock code before the first step."
        )
    return Family(config.model_type, norms=(), mlp="", named=False)


def head_width(config: Any) -> int:
    """Features of one attention head."""
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width


def layer_norms(family: Family, body: "Body") -> "tuple[nn.Module, ...]":
    """Every width-D norm of the body, the final one included: they share one compiled graph."""
    return tuple(getattr(layer, name) for layer in body.layers for name in family.norms) + (body.norm,)


def layer_mlps(family: Family, body: "Body") -> "tuple[nn.Module, ...]":
    """The feed-forward block of every layer."""
    return tuple(getattr(layer, family.mlp) for layer in body.layers)
