"""The recipe: one frozen model per section, each field with its meaning, unit, range and default.

The single source of truth: errors, `mode=show`, `--help` and the JSON schema read it from here. A subsystem is handed
its section (`recipe.compile`), never the recipe. Imports pydantic, section.py (what
the sections are made of) and data_section.py.
"""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from launcher.recipe.data_section import DataSection
from launcher.recipe.field_types import RULE, Choice, Distinct, Section, Text, off_is

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Region = Literal["mlp", "rmsnorm", "attention", "loss"]
REGIONS: list[Region] = ["mlp", "rmsnorm", "attention", "loss"]


class ModelSection(Section):
    """Which base model, and in which precision it computes."""

    name: Text = Field("unsloth/Llama-3.2-1B-Instruct", description="Hub id or local folder of the base model.")
    revision: Text | None = Field(
        None, description="Branch, tag or commit on the hub; null: the newest.", examples=["main"]
    )
    init: Annotated[Literal["pretrained", "random"], Choice] = Field(
        "pretrained", description="random: the architecture alone, seeded weights and the tiny tokenizer, offline."
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Choice] = Field(
        "auto", description="Compute precision; auto: the best that the device has."
    )
    attention: Annotated[Literal["auto", "sdpa", "varlen", "causal", "cudnn"], Choice] = Field(
        "auto",
        description="Attention core: masked SDPA or variable-length kernels (CUDA); for rows of one document causal "
        "SDPA or cuDNN (CUDA).",
    )


class QuantSection(Section):
    """How the frozen base weights are stored."""

    type: Annotated[Literal["nf4", "none"], Choice] = Field("nf4", description="4-bit NormalFloat, or not quantised.")
    double: bool = Field(True, description="Quantise the NF4 scales once more (saves about 0.4 bit per weight).")


class LoraSection(Section):
    """The low-rank adapters, the only weights that are trained."""

    r: int = Field(16, ge=1, le=1024, description="Rank of the adapters.")
    alpha: float = Field(32.0, gt=0, description="Scale of the update; it is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability of dropping an adapter's input.")
    targets: Annotated[list[Text], Distinct] = Field(
        default_factory=LORA_TARGETS.copy,
        min_length=1,
        description="Names of the linear modules that get an adapter; each must match.",
        json_schema_extra={"default": list(LORA_TARGETS), "uniqueItems": True},
    )


class CompileSection(Section):
    """What torch.compile compiles, and what happens when its contract breaks."""

    mode: Annotated[Literal["strict", "warn", "off"], Choice] = Field(
        "strict", description="A graph break or recompile stops the run, is reported, or nothing is compiled."
    )
    scope: Annotated[Literal["layer", "regions", "model"], Choice] = Field(
        "layer", description="Unit of compilation: a decoder layer, single regions of it, or the whole body."
    )
    regions: Annotated[list[Region], Distinct] = Field(
        default_factory=REGIONS.copy,
        description="What scope=regions compiles; the loss is compiled in every scope if listed.",
        json_schema_extra={"default": list(REGIONS), "uniqueItems": True},
    )
    backend: Annotated[Literal["inductor", "aot_eager"], Choice] = Field(
        "inductor", description="inductor generates kernels; aot_eager only traces (quick, for tests)."
    )
    cuda_graphs: Annotated[Literal["auto", "on", "off"], Choice] = Field(
        "auto", description="Replay the step from CUDA graphs; auto: where they can be had, on: else it is an error."
    )

    @field_validator("regions")
    @classmethod
    def _compiles_something(cls, regions: list[str], info: ValidationInfo) -> list[str]:
        if not regions and info.data.get("scope") == "regions":
            raise PydanticCustomError(
                RULE, "compile.scope=regions needs one or more of compile.regions; for none set compile.mode=off"
            )
        return regions


class MemorySection(Section):
    """Budgets of memory."""

    activations: Annotated[Literal["auto", "none", "selective", "full", "offload"], Choice] = Field(
        "auto",
        description="What is computed twice, not kept: nothing dear, all elementwise work, or whole layers; offload: "
        "layers too, and their inputs wait on the host; auto: the fastest that fits.",
    )
    budget: float | None = Field(
        None, ge=0, le=1, description="Fraction of the activations kept, in place of activations.", examples=[0.3]
    )
    loss_chunk_mib: int = Field(
        256,
        ge=1,
        le=65536,
        description="MiB of logits that live at once, in the compute dtype (a CPU holds them twice).",
    )

    @field_validator("budget")
    @classmethod
    def _one_of_the_two(cls, budget: float | None, info: ValidationInfo) -> float | None:
        activations = info.data.get("activations", "auto")
        if budget is not None and activations != "auto":
            raise PydanticCustomError(
                RULE, f"memory.budget takes the place of memory.activations; got {budget} and {activations}; give one"
            )
        return budget


class TrainSection(Section):
    """The loop: how long, how large a batch, and the optimizer."""

    steps: int | None = Field(None, ge=1, description="Optimizer steps; wins over epochs.", examples=[200])
    epochs: float | None = Field(
        None, gt=0, description="Passes over the packed data, if steps is null.", examples=[1.0], validate_default=True
    )
    micro_batch: int = Field(1, ge=1, description="Rows per forward pass and process.")
    accumulation: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    lr: float = Field(2e-4, gt=0, le=1, description="Learning rate at its highest.")
    schedule: Annotated[Literal["cosine", "linear", "constant"], Choice] = Field(
        "cosine", description="How the learning rate falls after the warm-up."
    )
    warmup: float = Field(0.05, ge=0, description="Warm-up: steps when >= 1, else a fraction of the run.")
    optimizer: Annotated[Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"], Choice] = Field(
        "adamw", description="adamw is fused PyTorch; the others are bitsandbytes'."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    clip: Annotated[Annotated[float, Field(gt=0)] | None, off_is(None)] = Field(
        1.0, description="Largest norm of the whole gradient; null or off: no clipping."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of weights, dropout and data order.")
    eval_every: int = Field(0, ge=0, description="Steps between evaluations; 0: before the first and after the last.")
    log_every: int = Field(1, ge=1, description="Steps between two host syncs, when metrics are read.")

    @field_validator("epochs")
    @classmethod
    def _has_an_end(cls, epochs: float | None, info: ValidationInfo) -> float | None:
        # A field's validator and not the model's: it reports beside the section's other errors, not after them.
        if epochs is None and info.data.get("steps", 0) is None:
            raise PydanticCustomError(RULE, "train.steps or train.epochs must be set; got neither; try train.steps=200")
        return epochs


class RunSection(Section):
    """What a run leaves behind."""

    output_dir: Text | None = Field(
        None, description="Folder of the run; null: runs/<recipe>-<time>.", examples=["./runs/mine"]
    )
    trackers: Annotated[list[Literal["tensorboard"]], Distinct] = Field(
        default_factory=list,
        description="Trackers that receive the metrics.",
        examples=[["tensorboard"]],
        json_schema_extra={"default": [], "uniqueItems": True},
    )
    sample_tokens: int = Field(48, ge=0, le=1024, description="Tokens of the sample printed at the end; 0: none.")


class ProofSection(Section):
    """How much a proof measures."""

    parity: int = Field(16, ge=1, description="Batches that mode=parity compares.")
    bench: int = Field(20, ge=1, description="Steps that mode=bench measures on each side.")
    bench_rows: Annotated[Literal["data", "random"], Choice] = Field(
        "data", description="What mode=bench trains on; random: rows of max_length random tokens, all supervised."
    )
    bench_naive: bool = Field(True, description="Whether mode=bench measures the naive side too.")


class Recipe(Section):
    """A fine-tune: everything that decides its result, and what it leaves behind."""

    model: ModelSection = Field(default_factory=ModelSection, description="Which base model, in which precision.")
    quant: QuantSection = Field(default_factory=QuantSection, description="How the frozen weights are stored.")
    lora: LoraSection = Field(default_factory=LoraSection, description="The adapters that are trained.")
    data: DataSection = Field(default_factory=DataSection, description="What is trained on, and how it is packed.")
    compile: CompileSection = Field(default_factory=CompileSection, description="What torch.compile compiles.")
    memory: MemorySection = Field(default_factory=MemorySection, description="Budgets of memory.")
    train: TrainSection = Field(default_factory=TrainSection, description="Length, batch and optimizer.")
    run: RunSection = Field(default_factory=RunSection, description="What the run leaves behind.")
    proof: ProofSection = Field(default_factory=ProofSection, description="How much a proof measures.")

    @field_validator("train")
    @classmethod
    def _a_stream_has_no_epochs(cls, train: TrainSection, info: ValidationInfo) -> TrainSection:
        data = info.data.get("data")
        if data and data.streaming and train.steps is None:
            raise PydanticCustomError(
                RULE, "train.steps must be set with data.streaming; got null; try train.steps=200"
            )
        return train
