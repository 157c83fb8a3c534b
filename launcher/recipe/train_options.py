"""What each schedule and each optimizer takes besides the rate: train.schedule_options and train.optimizer_options.

A class's fields have the names and the defaults that are handed to the library (tests hold the names against its real
signatures), so what a run computes does not change with a library's defaults.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from launcher.recipe.field_types import RecipeSection

Beta = Annotated[float, Field(ge=0, lt=1)]


class NoOptions(RecipeSection):
    """Takes none."""


class CosineOptions(RecipeSection):
    num_cycles: float = Field(0.5, gt=0, description="waves of the cosine, > 0")


class RestartOptions(RecipeSection):
    num_cycles: int = Field(1, ge=1, description="falls to zero, a whole number >= 1")


class CosineFloorOptions(CosineOptions):
    min_lr_rate: float = Field(0.1, ge=0, lt=1, description="last rate as a fraction of train.lr, >= 0 and < 1")


class PolynomialOptions(RecipeSection):
    power: float = Field(1.0, gt=0, description="exponent, > 0")
    lr_end: float = Field(1e-7, ge=0, description="last rate, below train.lr")


class StableDecayOptions(RecipeSection):
    num_decay_steps: float = Field(0.2, gt=0, description="steps of the fall when >= 1, else a fraction of the run")
    decay_type: Literal["cosine", "linear", "1-sqrt"] = Field("cosine", description="cosine, linear or 1-sqrt")
    min_lr_ratio: float = Field(0.0, ge=0, lt=1, description="last rate as a fraction of train.lr, >= 0 and < 1")


class InverseSqrtOptions(RecipeSection):
    timescale: int | None = Field(None, ge=1, description="steps, >= 1; if not given, those of the warm-up or 10000")


class AdamOptions(RecipeSection):
    betas: list[Beta] = Field([0.9, 0.999], min_length=2, max_length=2, description="two numbers >= 0 and < 1")
    eps: float = Field(1e-8, gt=0, description="a number > 0")


class ScheduleFreeOptions(AdamOptions):
    betas: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="two numbers > 0 and < 1"
    )
    r: float = Field(0.0, ge=0, description="power of the step in the average's weights, >= 0")
    weight_lr_power: float = Field(2.0, ge=0, description="power of the rate in the average's weights, >= 0")


class LionOptions(RecipeSection):
    betas: list[Beta] = Field([0.9, 0.99], min_length=2, max_length=2, description="two numbers >= 0 and < 1")


class AdafactorOptions(RecipeSection):
    clip_threshold: float = Field(1.0, gt=0, description="largest root mean square of an update over the rate, > 0")
    decay_rate: float = Field(-0.8, lt=0, description="exponent of the averages' decay, < 0")


class MuonOptions(RecipeSection):
    momentum: float = Field(0.95, ge=0, lt=1, description="a number >= 0 and < 1")
    nesterov: bool = Field(True, description="true or false")
    ns_steps: int = Field(5, ge=1, lt=100, description="Newton-Schulz iterations, from 1 to 99")


SCHEDULES: dict[str, type[RecipeSection]] = {
    "cosine": CosineOptions,
    "linear": NoOptions,
    "constant": NoOptions,
    "cosine_with_restarts": RestartOptions,
    "cosine_with_min_lr": CosineFloorOptions,
    "polynomial": PolynomialOptions,
    "warmup_stable_decay": StableDecayOptions,
    "inverse_sqrt": InverseSqrtOptions,
}
OPTIMIZERS: dict[str, type[RecipeSection]] = {
    **dict.fromkeys(("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"), AdamOptions),
    "adafactor": AdafactorOptions,
    **dict.fromkeys(("lion", "lion_8bit", "paged_lion", "paged_lion_8bit"), LionOptions),
    "muon": MuonOptions,
    "schedule_free_adamw": ScheduleFreeOptions,
}


def check_options(key: str, value: dict[str, Any] | None, *, choice: str) -> dict[str, Any] | None:
    """The options that are given for `choice`, a name of the tables, with their values as `key`_options holds them;
    None where none is given. Raises ValueError, naming what `choice` takes, for any other."""
    options = (SCHEDULES if key == "train.schedule" else OPTIMIZERS)[choice]
    try:
        return options.model_validate(value or {}).model_dump(exclude_unset=True) or None
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]["loc"][0]
        fields = options.model_fields.items()
        takes = ", ".join(f"{name} ({field.description})" for name, field in fields) or "none"
        defaults = ", ".join(f"{name}: {_plain(field.default)}" for name, field in fields if field.default is not None)
        remedy = f"try '{key}_options={{{defaults}}}'" if defaults else f"leave {key}_options out"
        got = f"got {wrong}: {_plain((value or {}).get(str(wrong)))}"
        raise ValueError(f"{key}_options of {key}={choice} must be of: {takes}; {got}; {remedy}") from None


def _plain(value: Any) -> str:
    """A value as YAML takes it on one line."""
    return json.dumps(value).replace('"', "")
