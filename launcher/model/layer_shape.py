"""The shape that decoder layers have in common, found on a model without a row in families.py: which of its modules
are norms and feed-forward, and whether its layers can be called as the packed forward calls them.

All is read from the model on the meta device, before any weight is. Whether the layers then compute what stock code
computes is not decided here but measured (proof/start.py).

Letters: B = 1 block, S positions, D model width.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.llama import modeling_llama as llama

from launcher.credentials import shortened
from launcher.errors import RecipeError
from launcher.model.families import Family
from launcher.model.untrainable import untrainable

BODY = ("embed_tokens", "layers", "norm", "rotary_emb")
NEEDED_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
# Attention that only looks at how it is called. As every name with sdpa, transformers refuses it where soft caps are.
PROBE = "packed_probe_sdpa"
PROBE_POSITIONS = 4


def family_of_shape(model: Any, family: Family) -> Family:
    """`family`, which has no row, completed from the modules of `model`, which is on the meta device.

    Raises RecipeError for a model without the common shape, naming the part."""
    _check_modules(model, family.model_type)
    layers, final = model.model.layers, type(model.model.norm)
    norms, mlps = [], []
    for name, child in layers[0].named_children():
        if type(child) is final:
            norms.append(name)
        elif not _is_attention(name) and any(isinstance(module, nn.Linear) for module in child.modules()):
            mlps.append(name)
    if len(mlps) != 1:
        raise _other_shape(family.model_type, f"{len(mlps)} feed-forward modules ({', '.join(mlps) or 'none'})")
    for number, layer in enumerate(layers):
        if missing := [name for name in (*norms, *mlps) if not hasattr(layer, name)]:
            raise _other_shape(family.model_type, f"no {missing[0]} in layer {number}, unlike layer 0")
    _check_calls(model, family.model_type)
    return replace(family, norms=tuple(norms), mlp=mlps[0])


def computes_as_llama(layer: Any) -> bool:
    """Whether attention and feed-forward of a decoder layer run the code of Llama's, so that what replaces Llama's
    (grouped.py) may replace theirs."""
    pairs: Any = (("self_attn", llama.LlamaAttention), ("mlp", llama.LlamaMLP))
    if not all(same_code(_forward(getattr(layer, name, None)), known.forward) for name, known in pairs):
        return False
    own = inspect.unwrap(_forward(layer.self_attn)).__globals__
    return all(
        same_code(own.get(name), getattr(llama, name)) for name in ("apply_rotary_pos_emb", "rotate_half", "repeat_kv")
    )


def norms_as_llama(norm: Any) -> bool:
    """Whether a norm runs the code of Llama's RMSNorm."""
    return same_code(_forward(norm), llama.LlamaRMSNorm.forward)


def same_code(function: Any, known: Callable[..., Any]) -> bool:
    """Whether two functions have the same bytecode, names and constants, docstrings aside."""
    if function is None:
        return False
    one, other = (inspect.unwrap(each) for each in (function, known))
    return _code(one) == _code(other)


def _forward(module: Any) -> Any:
    return getattr(type(module), "forward", None)


def _code(function: Any) -> tuple[Any, ...]:
    code = function.__code__
    constants = tuple(constant for constant in code.co_consts if constant != function.__doc__)
    return code.co_code, code.co_names, code.co_varnames, constants


def _is_attention(name: str) -> bool:
    return "attn" in name or "attention" in name


def _check_modules(model: Any, model_type: str) -> None:
    body: Any = getattr(model, "model", None)
    missing = [f"model.{name}" for name in BODY if not isinstance(getattr(body, name, None), nn.Module)]
    missing += [] if isinstance(getattr(model, "lm_head", None), nn.Linear) else ["lm_head"]
    if missing:
        raise _other_shape(model_type, f"no {', '.join(missing)}")
    if model.lm_head.bias is not None:
        raise _other_shape(model_type, "a bias in lm_head")
    if lacking := [name for name in NEEDED_SIZES if not isinstance(getattr(model.config, name, None), int)]:
        raise _other_shape(model_type, f"no {', '.join(lacking)} in its config")
    for name, module in body.layers.named_modules(prefix="model.layers"):
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            raise untrainable(model_type, f"convolutions or recurrence ({name})")
        if any(parameter.ndim > 2 for parameter in module.parameters(recurse=False)):
            raise untrainable(model_type, f"fused experts ({name})")
    if dropouts := [key for key, value in model.config.to_dict().items() if _drops(key, value)]:
        key = dropouts[0]
        raise RecipeError(
            f"the packed forward has no dropout of the base; the model's config sets {key}="
            f"{getattr(model.config, key)}.\nSet it to 0 in the model's config.json (lora.dropout is another)."
        )


def _drops(key: str, value: Any) -> bool:
    heads = ("classifier", "summary")  # of tasks that are not trained here
    dropout = key.endswith(("dropout", "pdrop", "dropout_prob")) and not key.startswith(heads)
    return dropout and isinstance(value, float) and value > 0


def _check_calls(model: Any, model_type: str) -> None:
    """Call every layer as the packed forward does, on the meta device."""
    calls: list[str] = []

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if missing := [name for name in ("cu_seqlens", "max_seqlen", "scaling") if kwargs.get(name) is None]:
            raise TypeError(f"attention is not told {', '.join(missing)}")
        calls.append(type(module).__name__)
        return query.transpose(1, 2).new_empty(*query.transpose(1, 2).shape[:-1], value.shape[-1]), None

    AttentionInterface.register(PROBE, attend)
    config, body = model.config, model.model
    stock = config._attn_implementation
    try:
        model.set_attn_implementation(PROBE)
        with torch.device("meta"), torch.no_grad():
            hidden = torch.empty(1, PROBE_POSITIONS, config.hidden_size, dtype=body.embed_tokens.weight.dtype)
            tables = body.rotary_emb(hidden, torch.arange(PROBE_POSITIONS)[None])
            starts = torch.tensor([0, PROBE_POSITIONS], dtype=torch.int32)
            for number, layer in enumerate(body.layers):
                out = layer(
                    hidden,
                    position_embeddings=tables,
                    attention_mask=None,
                    cu_seqlens=starts,
                    max_seqlen=PROBE_POSITIONS,
                )
                if not isinstance(out, Tensor) or out.shape != hidden.shape:
                    raise TypeError(f"it returns {type(out).__name__}, not hidden states")
                if len(calls) != number + 1:
                    raise TypeError("it does not call its attention through AttentionInterface")
    except Exception as error:  # code of any model: whatever it raises, it cannot be called like this
        what = shortened(f"{type(error).__name__}: {' '.join(str(error).split())}", 160)
        raise _other_shape(model_type, f"layers that cannot be called with packed documents: {what}") from None
    finally:
        model.set_attn_implementation(stock)


def _other_shape(model_type: str, problem: str) -> RecipeError:
    return RecipeError(
        f"model.family=auto needs the common shape of decoders (docs/any-model.md); {model_type!r} has {problem}.\n"
        "Stock Transformers + PEFT runs it."
    )
