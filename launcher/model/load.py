"""The frozen base in NF4 (bitsandbytes): from a full checkpoint, from one already quantised, or random.

Quantised are the linears inside the decoder layers; embedding, norms and head stay in the compute dtype.
"""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import replace_with_bnb_linear

from launcher.errors import RecipeError
from launcher.recipe.schema import QuantSection


def bnb_config(quant: QuantSection, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The BitsAndBytesConfig that a user needs to load the base as it was trained; None when nothing is quantised."""
    if quant.type == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.type,
        bnb_4bit_use_double_quant=quant.double,
        bnb_4bit_compute_dtype=dtype,
    )


def load_base(
    source: str, config: Any, *, quant: QuantSection, dtype: torch.dtype, device: torch.device, revision: str | None
) -> PreTrainedModel:
    """The checkpoint at `source` (folder or hub id) on `device`, quantised unless it already is."""
    ready = getattr(config, "quantization_config", None) is not None
    wanted = None if ready else bnb_config(quant, dtype)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        revision=revision,
        dtype=dtype,
        device_map={"": device},
        trust_remote_code=False,
        use_safetensors=True,
        # An explicit None would switch off the quantisation that the checkpoint brings.
        **({"quantization_config": wanted} if wanted else {}),
    )
    # A checkpoint quantised for bf16 may run on a card without it: this run's dtype computes. transformers leaves what
    # such a checkpoint has not quantised (embeddings, norms, head) in the dtype that it was saved in.
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
    for parameter in model.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit):  # may be stored as bf16, not be it
            parameter.data = parameter.data.to(dtype)
    return model


def random_base(
    config: Any, *, quant: QuantSection, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    """An untrained model of this architecture, made and quantised on `device` one weight at a time.

    The full-precision model never exists, so that an 8B architecture fits wherever its NF4 form does.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    quantization = bnb_config(quant, dtype)
    if quantization is not None:
        replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantization)
        model.is_loaded_in_4bit = True
    generator = torch.Generator(device=device).manual_seed(seed)
    std = config.initializer_range

    def draw(shape: torch.Size) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=std, generator=generator)

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(module, Linear4bit) and name == "weight":
                module.weight = _quantized(draw(parameter.shape), module, quant, device)
            elif parameter.ndim == 1:  # norm weights are 1; the families here have no biases worth drawing
                value = torch.ones if name == "weight" else torch.zeros
                setattr(module, name, nn.Parameter(value(parameter.shape, dtype=dtype, device=device)))
            else:
                setattr(module, name, nn.Parameter(draw(parameter.shape)))
    with torch.device(device):  # its frequencies are buffers, computed rather than loaded
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.tie_weights()
    return model


def check_prequantized(config: Any, quant: QuantSection) -> None:
    """Raise RecipeError unless a checkpoint that is already quantised is what `quant` asks for."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    settings = found if isinstance(found, dict) else found.to_dict()
    kind = settings.get("bnb_4bit_quant_type") if settings.get("load_in_4bit") else settings.get("quant_method")
    if kind != quant.type:
        raise RecipeError(
            f"quant.type={quant.type} must be what the checkpoint holds; it is already quantised as {kind!r}.\n"
            "Name the unquantised checkpoint in model.name, or one quantised to 4-bit nf4 by bitsandbytes."
        )
    double = bool(settings.get("bnb_4bit_use_double_quant"))
    if double != quant.double:
        raise RecipeError(
            f"quant.double={quant.double} must be what the checkpoint holds; it is quantised with {double}.\n"
            f"Set quant.double={str(double).lower()}."
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters; a 4-bit weight counts as the matrix it stands for, a tied weight once."""
    total = trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = parameter.numel() if state is None else state.shape[0] * state.shape[1]
        total += size
        trainable += size if parameter.requires_grad else 0
    return total, trainable


def _quantized(weight: torch.Tensor, module: Linear4bit, quant: QuantSection, device: torch.device) -> Params4bit:
    made: Any = Params4bit(
        weight, requires_grad=False, compress_statistics=quant.double, quant_type=quant.type, module=module
    )
    quantised: Params4bit = made.to(device)  # moving a full-precision Params4bit quantises it
    return quantised
