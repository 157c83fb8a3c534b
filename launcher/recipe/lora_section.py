"""The section lora of a recipe: the adapters, and how they begin."""

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from launcher.recipe.field_types import Distinct, NonEmptyText, RecipeSection

ALL_LINEAR, EXPRESSION = "all-linear", "re:"  # in lora.targets: every linear; what a regular expression begins with
FUSED_PROJECTIONS = {  # a projection in which some models hold several, and which these are; Phi-3 has both
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
LARGEST_RANK = 1024
NITER = "pissa_niter_"  # of PEFT: PiSSA by a randomised SVD of so many iterations
NOT_OFFERED = {  # of PEFT's initialisations: why
    "corda": "takes its product, chosen by covariances of data, out of the base: the adapter would not fit the base",
    "lora_ga": "takes its product, chosen by gradients of the whole weights, out of the base, which it would not fit",
}
COMPUTED_STARTS = ("loftq", "eva")  # of lora.init: from the base's files, from the data


def entry_alone(value: Any) -> Any:
    """A whole number where a list is expected is its only entry."""
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


def check_expression(pattern: str, key: str) -> None:
    """Raise ValueError unless `pattern`, an entry of `key`, is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key} must hold regular expressions; {pattern!r} is none: {error}") from None


def cut_by_comma(targets: Sequence[str], target: str) -> str:
    """What is said of a regular expression that fails as an entry of lora.targets, if another entry follows: a comma
    may have cut it."""
    if not target.startswith(EXPRESSION) or target == targets[-1]:
        return ""
    return f"\nA comma ends an entry: if {target!r} goes on after it, write lora.targets=['re:…,…'] with the quotes."


def fused_targets(linears: set[str], targets: Iterable[str]) -> list[str]:
    """`targets` as a model with these `linears` (last words of names) has them: a fused projection stands for its parts
    where all of them are named."""
    fitted = [*targets]
    for fused, parts in FUSED_PROJECTIONS.items():
        if fused in linears and not linears & {*parts} and {*parts} <= {*fitted}:
            fitted = list(dict.fromkeys(fused if name in parts else name for name in fitted))
    return fitted


def layer_range(text: str) -> str:
    """Raises ValueError unless `text` is a number or a range of numbers."""
    if not re.fullmatch(r"\d+(-\d+)?", text):
        raise ValueError(f"lora.layers must hold numbers and ranges, as 0-7 or 12; got {text!r}")
    first, _, last = text.partition("-")
    if last and int(last) < int(first):
        raise ValueError(f"a range of lora.layers must end after it begins; got {text}")
    return text


def possible_start(value: Any) -> Any:
    """Raises ValueError, with the reason, for one of PEFT's initialisations that is not offered."""
    if isinstance(value, str) and value in NOT_OFFERED:
        raise ValueError(f"lora.init={value} {NOT_OFFERED[value]}; use another")
    return value


def is_from_weights(init: str) -> bool:
    """Whether A and B begin as parts of the base's weights under this value of lora.init (model/lora_start.py)."""
    return init == "olora" or init.startswith("pissa")


number_as_text = BeforeValidator(lambda value: str(value) if type(value) is int else value)
LayerRange = Annotated[str, number_as_text, AfterValidator(layer_range)]
TokenName = Annotated[str, number_as_text, Field(min_length=1)]


class LoraSection(RecipeSection):
    """The low-rank adapters, and the rows of single tokens: the only weights that are trained."""

    r: int = Field(16, ge=1, le=LARGEST_RANK, description="Rank of the adapters.")
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
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=LARGEST_RANK)]] = Field(
        {},
        description="Other ranks than r, by a regular expression for the end of a module's name.",
        examples=[{"down_proj": 8}],
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="Other alphas than alpha, by a regular expression for the end of a module's name.",
        examples=[{"down_proj": 16}],
    )
    plus_ratio: float = Field(
        1.0, gt=0, description="Learning rate of B and of DoRA's magnitudes as a multiple of train.lr (LoRA+)."
    )
    init: Annotated[
        Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"]
        | Annotated[str, Field(pattern=rf"^{NITER}\d{{1,2}}$", description=f"{NITER}N")],
        BeforeValidator(possible_start),
    ] = Field(
        "default",
        description="How A and B begin. pissa and olora: as parts of the base, saved as an adapter of rank 2r; eva: A "
        "from the inputs of the linears; loftq: B A is what NF4 has rounded away; else drawn. But for loftq, the model "
        "is the base.",
        examples=["pissa_niter_4"],
    )
    trainable_tokens: Annotated[Distinct[TokenName], BeforeValidator(entry_alone)] = Field(
        [],
        description="Tokens, as text or ids, whose rows in embedding and output head are trained too; none if empty.",
        examples=[["<|im_start|>", "<|im_end|>"]],
    )
    dora: bool = Field(False, description="Train a magnitude for each row of W + update beside its direction (DoRA).")
    start_from: NonEmptyText | None = Field(
        None,
        description="Folder or hub id of an adapter whose weights training begins with; null: new ones.",
        examples=["./runs/first/adapter"],
    )

    @property
    def chosen_layers(self) -> list[range]:
        """The ranges of `layers`; none: all layers."""
        ends = [(first, last or first) for first, _, last in (entry.partition("-") for entry in self.layers)]
        return [range(int(first), int(last) + 1) for first, last in ends]

    @property
    def starts_from_weights(self) -> bool:
        """Whether A and B begin as parts of the base's weights."""
        return is_from_weights(self.init)

    @property
    def rank_factor(self) -> int:
        """The rank of the saved adapter, the frozen start included, as a multiple of the trained one's."""
        return 2 if self.starts_from_weights else 1

    @field_validator("targets")
    @classmethod
    def _are_expressions(cls, targets: list[str]) -> list[str]:
        for target in targets:
            if target.startswith(EXPRESSION):
                try:
                    check_expression(target.removeprefix(EXPRESSION), "lora.targets")
                except ValueError as error:
                    raise ValueError(f"{error}{cut_by_comma(targets, target)}") from None
        if ALL_LINEAR in targets and len(targets) > 1:
            raise ValueError(f"lora.targets={ALL_LINEAR} names every linear; got other entries beside it")
        return targets

    @field_validator("init")
    @classmethod
    def _has_halves(cls, init: str, info: ValidationInfo) -> str:
        ranks = [info.data.get("r", 2), *info.data.get("rank_pattern", {}).values()]
        if init == "orthogonal" and (odd := [rank for rank in ranks if rank % 2]):
            raise ValueError(f"lora.init=orthogonal needs even ranks; got {odd[0]}; try {odd[0] + 1}")
        if is_from_weights(init) and 2 * max(ranks) > LARGEST_RANK:
            raise ValueError(f"lora.init={init} saves an adapter of rank 2r, at most {LARGEST_RANK}; r is {max(ranks)}")
        return init

    @field_validator("dora")
    @classmethod
    def _has_no_start_of_its_own(cls, dora: bool, info: ValidationInfo) -> bool:
        init = info.data.get("init", "default")
        if dora and is_from_weights(init):
            raise ValueError(f"lora.dora needs an adapter that begins at zero; got lora.init={init}; use default")
        return dora

    @field_validator("start_from")
    @classmethod
    def _is_the_only_start(cls, start: str | None, info: ValidationInfo) -> str | None:
        if start and info.data.get("init", "default") != "default":
            raise ValueError(f"lora.start_from takes the place of lora.init; got {start} and {info.data['init']}")
        return start

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _have_expressions(cls, patterns: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        for pattern in patterns:
            check_expression(pattern, f"lora.{info.field_name}")
        return patterns
