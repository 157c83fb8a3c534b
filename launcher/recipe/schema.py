"""The recipe: one frozen model per section, each field with its meaning, unit, range and default.

Errors, `mode=show`, `--help` and the JSON schema are written from these fields. A subsystem is handed its section
(`recipe.compile`), never the recipe. The sections lora, data and train are in files of their own.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from launcher.recipe.data_section import DataSection
from launcher.recipe.field_types import INTERVAL, Distinct, NonEmptyText, OnOff, RecipeSection, dtype_name
from launcher.recipe.lora_section import LoraSection
from launcher.recipe.proof_section import ProofSection
from launcher.recipe.train_section import TrainSection

ALTERNATIVES = (("train.steps", "train.epochs"), ("memory.budget", "memory.activations"))  # one takes the other's place


class ModelSection(RecipeSection):
    """Which base model, and in which precision it computes."""

    name: NonEmptyText = Field("unsloth/Llama-3.2-1B-Instruct", description="Hub id or local folder of the base model.")
    revision: NonEmptyText | None = Field(
        None, description="Branch, tag or commit on the hub; null: the newest.", examples=["main"]
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: the architecture alone, seeded weights and the tiny tokenizer, offline."
    )
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        BeforeValidator(
            dtype_name,
            json_schema_input_type=Literal["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"],
        ),
    ] = Field("auto", description="Compute precision; auto: the best that the device has.")
    attention: Literal["auto", "sdpa", "varlen", "causal", "cudnn"] = Field(
        "auto",
        description="Attention core: masked SDPA, or variable-length kernels (CUDA); where a block is one document, "
        "causal SDPA or cuDNN (CUDA).",
    )
    family: Literal["named", "auto"] = Field(
        "named",
        description="named: only architectures that are known here; auto: any decoder of the common shape, if it is "
        "found equal to stock code before the first step (docs/any-model.md).",
    )


class QuantSection(RecipeSection):
    """How the frozen base weights are stored."""

    type: Literal["nf4", "none"] = Field("nf4", description="4-bit NormalFloat, or not quantised.")
    double: bool = Field(True, description="Quantise the NF4 scales once more (saves about 0.4 bit per weight).")


class CompileSection(RecipeSection):
    """What torch.compile compiles, and what happens when its contract breaks."""

    mode: Annotated[Literal["strict", "warn", "off"], OnOff] = Field(
        "strict",
        description="strict: a graph break or recompile stops the run; warn: it is reported; off: nothing is compiled.",
    )
    scope: Literal["layer", "regions", "model"] = Field(
        "layer", description="Unit of compilation: a decoder layer, single regions of it, or the whole body."
    )
    regions: Distinct[Literal["mlp", "rmsnorm", "attention", "loss"]] = Field(
        ["mlp", "rmsnorm", "attention", "loss"],
        description="What scope=regions compiles; other scopes heed only whether it lists the loss.",
    )
    backend: Literal["inductor", "aot_eager"] = Field(
        "inductor", description="inductor generates kernels; aot_eager only traces (quick, for tests)."
    )
    cuda_graphs: Annotated[Literal["auto", "on", "off"], OnOff] = Field(
        "auto", description="Replay the step from CUDA graphs; auto: where possible; on: an error where it is not."
    )

    @field_validator("regions")
    @classmethod
    def _compiles_something(cls, regions: list[str], info: ValidationInfo) -> list[str]:
        if not regions and info.data.get("scope") == "regions":
            raise ValueError(
                "compile.scope=regions needs one or more of compile.regions; for none set compile.mode=off"
            )
        return regions


class MemorySection(RecipeSection):
    """Budgets of memory."""

    activations: Literal["auto", "none", "selective", "full", "offload"] = Field(
        "auto",
        description="What the backward pass computes again: only the cheapest (none), all elementwise work, or whole "
        "layers; offload: whole layers, their inputs kept on the host; auto: the fastest that fits.",
    )
    budget: float | None = Field(
        None, ge=0, le=1, description="Fraction of the activations kept, in place of activations.", examples=[0.3]
    )
    loss_chunk_mib: int = Field(
        256, ge=1, le=65536, description="MiB of logits held at once, in the compute dtype (twice that on a CPU)."
    )

    @field_validator("budget")
    @classmethod
    def _one_of_the_two(cls, budget: float | None, info: ValidationInfo) -> float | None:
        activations = info.data.get("activations", "auto")
        if budget is not None and activations != "auto":
            raise ValueError(
                f"memory.budget takes the place of memory.activations; got {budget} and {activations}; give one"
            )
        return budget


class RunSection(RecipeSection):
    """What a run leaves behind."""

    output_dir: NonEmptyText | None = Field(
        None, description="Folder of the run; null: runs/<recipe>-<time>.", examples=["./runs/mine"]
    )
    resume: NonEmptyText = Field(
        "auto",
        description="auto: go on from the newest checkpoint in run.output_dir, if it has one; never: such a folder is "
        "refused; or a run's folder, or that of one of its checkpoints, to go on there.",
        examples=["auto", "never", "./runs/mine", "./runs/mine/checkpoints/step-500"],
    )

    allow_reshard: bool = Field(
        False,
        description="Go on with another number of processes, train.micro_batch or train.accumulation than the "
        "checkpoint's; false: that is refused.",
    )

    @field_validator("resume")
    @classmethod
    def _one_folder(cls, resume: str, info: ValidationInfo) -> str:
        folder = info.data.get("output_dir")
        if resume not in ("auto", "never") and folder is not None:
            raise ValueError(
                f"run.resume names the folder of the run; got {resume} and run.output_dir={folder}; give one"
            )
        return resume

    rescue_dir: NonEmptyText | None = Field(
        None,
        description="Folder for the adapter where the run folder takes no more (a full disk); null: the system's "
        "temporary folder.",
        examples=["./rescued"],
    )
    trackers: Distinct[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        [], description="Trackers that receive the metrics (docs/trackers.md).", examples=[["tensorboard", "wandb"]]
    )
    timeout: Annotated[str, Field(pattern=INTERVAL), OnOff] = Field(
        "5m",
        description="How long a rank may be silent, or keep the others waiting in a step, before all end: a time as "
        "90s, 10m or 2h, or off. A rank that is gone ends the others at once.",
        examples=["5m", "off"],
    )
    sample_tokens: int = Field(48, ge=0, le=1024, description="Tokens of the sample printed at the end; 0: none.")
    eval_samples: int = Field(
        0, ge=0, le=8, description="Validation prompts that are answered at every evaluation, in samples.jsonl."
    )


class Recipe(RecipeSection):
    """A fine-tune: everything that decides its result, and what it leaves behind."""

    model: ModelSection = Field(default_factory=ModelSection)
    quant: QuantSection = Field(default_factory=QuantSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    data: DataSection = Field(default_factory=DataSection)
    compile: CompileSection = Field(default_factory=CompileSection)
    memory: MemorySection = Field(default_factory=MemorySection)
    train: TrainSection = Field(default_factory=TrainSection)
    run: RunSection = Field(default_factory=RunSection)
    proof: ProofSection = Field(default_factory=ProofSection)

    @field_validator("train")
    @classmethod
    def _data_allows_it(cls, train: TrainSection, info: ValidationInfo) -> TrainSection:
        data = info.data.get("data")
        if data and data.streaming and train.steps is None:
            raise ValueError("train.steps must be set with data.streaming; got null; try train.steps=200")
        wanting = "patience" if train.patience else train.keep_best and "keep_best"
        if wanting and data and data.validation == 0:  # that no row validates otherwise, the rows tell (train/setup.py)
            raise ValueError(f"train.{wanting} needs validation rows; got data.validation=0; try data.validation=0.05")
        return train

    @field_validator("proof")
    @classmethod
    def _unknown_models_are_proved(cls, proof: ProofSection, info: ValidationInfo) -> ProofSection:
        model = info.data.get("model")
        if model and model.family == "auto" and proof.start == "off":
            raise ValueError("proof.start is what model.family=auto relies on; got off; leave proof.start out")
        return proof
