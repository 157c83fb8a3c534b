"""The supported architectures, one entry each, with what differs between them. To add one, add an entry and
a test config (`pytest -k families`); CONTRIBUTING.md walks through it.

All of them have the modules `CausalLM.model.{embed_tokens, layers, norm, rotary_emb}` and `CausalLM.lm_head`, and
decoder layers that are called with (hidden, attention_mask=, position_embeddings=, **kwargs).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # config_file.py reads FAMILIES before torch is imported
    from torch import nn


@dataclass(frozen=True)
class Family:
    """One architecture, known by its `config.model_type`; norms and mlp are attributes of a decoder layer. `reads`: the
    keys of config.json that its stock code reads, of those that only some architectures know (`stock_setting`)."""

    model_type: str
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    mlp: str = "mlp"
    reads: tuple[str, ...] = ()
    named: bool = True  # has a row here; else norms and mlp are found on the model (layer_shape.py)


SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
WINDOW = ("sliding_window",)  # of all layers
WINDOWS = ("sliding_window", "layer_types")  # of some layers
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
FAMILIES = {
    family.model_type: family
    for family in (
        Family("gemma2", norms=SANDWICH, reads=(*WINDOWS, *CAPS)),
        Family("gemma3_text", norms=SANDWICH, reads=(*WINDOWS, "final_logit_softcapping")),
        Family("granite", reads=("logits_scaling",)),
        Family("llama"),
        Family("ministral", reads=WINDOWS),
        Family("mistral", reads=WINDOW),
        Family("olmo2", norms=SANDWICH[1::2]),
        Family("phi3", reads=WINDOW),
        Family("qwen2", reads=WINDOWS),
        Family("qwen3", reads=WINDOWS),
        Family("smollm3", reads=WINDOWS),
    )
}


def stock_setting(config: Any, key: str) -> Any:
    """The value of `key` where the stock code of the config's architecture reads it, else None: transformers keeps
    what config.json says beyond that as attributes of the config. Without a row: where its class declares the key."""
    family = FAMILIES.get(config.model_type)
    read = getattr(type(config), "__dataclass_fields__", {}) if family is None else family.reads
    return getattr(config, key, None) if key in read else None


def head_width(config: Any) -> int:
    """Features of one attention head."""
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width


def layer_norms(family: Family, body: Any) -> "tuple[nn.Module, ...]":
    """Every width-D norm of the body, the final one included: they share one compiled graph."""
    return tuple(getattr(layer, name) for layer in body.layers for name in family.norms) + (body.norm,)


def layer_mlps(family: Family, body: Any) -> "tuple[nn.Module, ...]":
    """The feed-forward block of every layer."""
    return tuple(getattr(layer, family.mlp) for layer in body.layers)
