"""Checkpoints that are quantised already, by what their config.json says; imports no torch."""

from collections.abc import Mapping
from typing import Any

from launcher.errors import RecipeError
from launcher.recipe.schema import QuantSection

DEQUANTISED = {  # by quant_method: what makes transformers load it as floats
    "fp8": "FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "Mxfp4Config(dequantize=True)",
    "compressed-tensors": "CompressedTensorsConfig(run_compressed=False)",
}


def quantisation_of(config: Any) -> Mapping[str, Any] | None:
    """How a checkpoint is quantised, by its config.json or transformers' config; None where it is not."""
    settings: Any = config if isinstance(config, Mapping) else vars(config)
    found = settings.get("quantization_config") or settings.get("compression_config")
    found = found.to_dict() if hasattr(found, "to_dict") else found
    return found if isinstance(found, Mapping) else None  # else transformers says what is wrong with it


def check_quantisation(config: Any, quant: QuantSection) -> None:
    """Raise RecipeError, naming the method and what to do, where a checkpoint is quantised and not as `quant` asks."""
    settings = quantisation_of(config)
    if settings is None:
        return
    kind = _kind(settings)
    if kind != quant.type:
        method = str(settings.get("quant_method"))
        remedy = "Name the unquantised checkpoint in model.name, or one quantised to 4-bit nf4 by bitsandbytes"
        if method in DEQUANTISED:
            how = f"quantization_config={DEQUANTISED[method]}"
            remedy += (
                f";\nor write it as floats: AutoModelForCausalLM.from_pretrained(name, {how}).save_pretrained(folder)"
            )
        raise RecipeError(
            f"quant.type={quant.type} must be what the checkpoint holds; it is already quantised as {kind!r}.\n"
            f"{remedy}."
        )
    double = bool(settings.get("bnb_4bit_use_double_quant"))
    if double != quant.double:
        raise RecipeError(
            f"quant.double={quant.double} must be what the checkpoint holds; it is quantised with {double}.\n"
            f"Set quant.double={str(double).lower()}."
        )


def _kind(settings: Mapping[str, Any]) -> str:
    if settings.get("load_in_8bit"):
        return "bitsandbytes 8-bit"
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "fp4"))  # bitsandbytes' own default
    return str(settings.get("quant_method"))
