"""The recipe's train section: how long, how large a batch, which optimizer and which schedule."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from launcher.recipe.field_types import INTERVAL, INTERVAL_MEANING, RecipeSection, off_is
from launcher.recipe.train_options import OPTIMIZERS, SCHEDULES, PolynomialOptions, check_options

NamedOptions = (
    Annotated[dict[str, Any], Field(description="names and values, as {name: value}")]
    | Annotated[None, Field(description="null")]
)


class TrainSection(RecipeSection):
    """The loop: how long, how large a batch, and the optimizer."""

    steps: int | None = Field(None, ge=1, description="Optimizer steps; or give train.epochs.", examples=[200])
    epochs: float | None = Field(
        None,
        gt=0,
        description="Passes over the packed data; or give train.steps.",
        examples=[1.0],
        validate_default=True,
    )
    micro_batch: int = Field(1, ge=1, description="Blocks per forward pass and process.")
    accumulation: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    lr: float = Field(2e-4, gt=0, le=1, description="Peak learning rate.")
    schedule: Literal[
        "cosine",
        "linear",
        "constant",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "warmup_stable_decay",
        "inverse_sqrt",
    ] = Field("cosine", description="How the learning rate goes on after the warm-up (docs/optimizers.md).")
    warmup: float = Field(0.05, ge=0, description="Warm-up: steps when >= 1, else a fraction of the run.")
    optimizer: Literal[
        "adamw",
        "adamw_8bit",
        "paged_adamw",
        "paged_adamw_8bit",
        "adafactor",
        "lion",
        "lion_8bit",
        "paged_lion",
        "paged_lion_8bit",
        "muon",
        "schedule_free_adamw",
    ] = Field(
        "adamw",
        description="adamw is fused PyTorch; muon is PyTorch's, adafactor Transformers', schedule_free_adamw "
        "schedulefree's, the others are bitsandbytes' (docs/optimizers.md).",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, of matrices only.")
    clip: Annotated[Annotated[float, Field(gt=0)] | None, off_is(None)] = Field(
        1.0, description="Largest norm of the whole gradient; null or off: no clipping."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of weights, dropout and data order.")
    deterministic: bool = Field(
        False,
        description="Only kernels that give the same bits every time, at some cost, so that two runs on a GPU are "
        "equal; on a CPU they are in any case.",
    )
    eval_every: int = Field(
        0, ge=0, description="Steps between evaluations; 0: only before the first step and after the last."
    )
    save_every: Annotated[
        Annotated[int, Field(ge=0, description="steps (a whole number >= 0)")]
        | Annotated[str, Field(pattern=INTERVAL, description=INTERVAL_MEANING)],
        off_is(0),
    ] = Field(
        "10m",
        description="Steps or time between two checkpoints; the last step and a signal save one besides. 0 or off: "
        "none.",
        examples=["10m", 500],
    )
    keep: int = Field(2, ge=1, description="Checkpoints kept: the newest, and the best by eval loss besides.")
    patience: Annotated[Annotated[int, Field(ge=1)] | None, off_is(None)] = Field(
        None,
        description="Evaluations in a row without a lower eval loss that end training early; null or off: none do.",
        examples=[3],
    )
    keep_best: bool = Field(
        False, description="Save where the eval loss is lowest, and give back the adapter of that step at the end."
    )
    spike_patience: Annotated[Annotated[int, Field(ge=1)] | None, off_is(None)] = Field(
        None,
        description="Spikes in a row that end the run: steps whose gradient norm or loss is far above the usual. null "
        "or off: they are only noted.",
        examples=[5],
    )
    log_every: int = Field(
        1, ge=1, description="Steps between two reads of the metrics, each of which waits for the device."
    )

    schedule_options: NamedOptions = Field(
        None,
        description="What train.schedule takes besides, by name.",
        examples=[{"num_cycles": 1}],
        validate_default=True,
    )
    optimizer_options: NamedOptions = Field(
        None, description="What train.optimizer takes besides, by name.", examples=[{"betas": [0.9, 0.95]}]
    )

    def schedule_parameters(self) -> dict[str, Any]:
        """What train.schedule takes besides the steps, as given or by default."""
        return SCHEDULES[self.schedule].model_validate(self.schedule_options or {}).model_dump(exclude_none=True)

    def optimizer_parameters(self) -> dict[str, Any]:
        """What train.optimizer takes besides rate and weight decay, as given or by default."""
        return OPTIMIZERS[self.optimizer].model_validate(self.optimizer_options or {}).model_dump()

    @field_validator("schedule_options", "optimizer_options")
    @classmethod
    def _is_taken(cls, options: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        key = str(info.field_name).removesuffix("_options")
        if key not in info.data:  # it has an error of its own
            return options
        return check_options(f"train.{key}", options, choice=info.data[key])

    @field_validator("schedule_options")
    @classmethod
    def _ends_below_the_peak(cls, options: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        peak, is_polynomial = info.data.get("lr"), info.data.get("schedule") == "polynomial"
        last = (options or {}).get("lr_end", PolynomialOptions().lr_end)
        if is_polynomial and peak is not None and last >= peak:
            raise ValueError(
                f"train.schedule=polynomial must fall: lr_end below train.lr; got {last:g} and {peak:g}; "
                f"try 'train.schedule_options={{lr_end: {peak / 10:g}}}'"
            )
        return options

    neftune_alpha: float = Field(
        0.0,
        ge=0,
        description="Noise on the embeddings of training (NEFTune), in alpha / sqrt(tokens * width); 0: none.",
    )

    @field_validator("optimizer")
    @classmethod
    def _has_its_schedule(cls, optimizer: str, info: ValidationInfo) -> str:
        schedule = info.data.get("schedule", "constant")  # without: it has an error of its own
        if optimizer == "schedule_free_adamw" and schedule != "constant":
            raise ValueError(
                f"train.optimizer={optimizer} takes the place of a falling rate, so train.schedule must be constant "
                f"(after the warm-up); got {schedule}; set train.schedule=constant"
            )
        return optimizer

    @field_validator("patience", "keep_best")
    @classmethod
    def _is_evaluated(cls, value: int | bool | None, info: ValidationInfo) -> int | bool | None:
        key = f"train.{info.field_name}"
        if value and not info.data.get("eval_every", 1):
            raise ValueError(f"{key} needs evaluations; got train.eval_every=0; try train.eval_every=20")
        if value and info.field_name == "keep_best" and info.data.get("save_every") == 0:
            raise ValueError(f"{key} needs checkpoints; got train.save_every=off; leave that out")
        return value

    @field_validator("epochs")
    @classmethod
    def _has_one_end(cls, epochs: float | None, info: ValidationInfo) -> float | None:
        # A field's validator, not the model's: that would run only once all fields are valid, and hide this error.
        steps = info.data.get("steps", 0)  # 0: it has an error of its own
        if epochs is None and steps is None:
            raise ValueError("train.steps or train.epochs must be set; got neither; try train.steps=200")
        if epochs is not None and steps:
            raise ValueError(f"train.steps and train.epochs both set the end; got {steps} and {epochs:g}; give one")
        return epochs
