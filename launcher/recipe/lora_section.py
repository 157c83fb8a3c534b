"""The section lora of a recipe: the adapters, and how they begin."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from launcher.recipe.field_types import Distinct, NonEmptyText, RecipeSection

ALL_LINEAR, EXPRESSION = "all-linear", "re:"  # in lora.targets: every linear; what a regular expression begins with


def entry_alone(value: Any) -> Any:
    """A whole number where a list is expected is its only entry."""
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


def check_expression(pattern: str, key: str) -> None:
    """Raise ValueError unless `pattern`, an entry of `key`, is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key} must hold regular expressions; {pattern!r} is none: {error}") from None


def layer_range(text: str) -> str:
    """Raises ValueError where a range of layers ends before it begins."""
    first, _, last = text.partition("-")
    if last and int(last) < int(first):
        raise ValueError(f"a range of lora.layers must end after it begins; got {text}")
    return text


LayerRange = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    Field(pattern=r"^\d+(-\d+)?$"),
    AfterValidator(layer_range),
]


class LoraSection(RecipeSection):
    """The low-rank adapters, the only weights that are trained."""

    r: int = Field(16, ge=1, le=1024, description="Rank of the adapters.")
    alpha: float = Field(32.0, gt=0, description="Scale of the update; it is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropping an adapter's input.")
    targets: Distinct[NonEmptyText] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="Names of the linear modules that get an adapter; each must match. all-linear: all of them; re:... "
        "is a regular expression for a module's whole name.",
    )
    rslora: bool = Field(False, description="Multiply the update by alpha / sqrt(r) in place of alpha / r.")
    layers: Annotated[Distinct[LayerRange], BeforeValidator(entry_alone)] = Field(
        [], description="Decoder layers that get adapters, as 0-7,12; all if empty.", examples=[["0-7", "12"]]
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = Field(
        {},
        description="Other ranks than r, by a regular expression for the end of a module's name.",
        examples=[{"down_proj": 8}],
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="Other alphas than alpha, by a regular expression for the end of a module's name.",
        examples=[{"down_proj": 16}],
    )

    @property
    def chosen_layers(self) -> frozenset[int] | None:
        """The numbers of `layers`; None: all."""
        ends = [(first, last or first) for first, _, last in (entry.partition("-") for entry in self.layers)]
        return frozenset(n for first, last in ends for n in range(int(first), int(last) + 1)) if ends else None

    @field_validator("targets")
    @classmethod
    def _are_expressions(cls, targets: list[str]) -> list[str]:
        for target in targets:
            if target.startswith(EXPRESSION):
                check_expression(target.removeprefix(EXPRESSION), "lora.targets")
        if ALL_LINEAR in targets and len(targets) > 1:
            raise ValueError(f"lora.targets={ALL_LINEAR} names every linear; got other entries beside it")
        return targets

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _have_expressions(cls, patterns: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        for pattern in patterns:
            check_expression(pattern, f"lora.{info.field_name}")
        return patterns
