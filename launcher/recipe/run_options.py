"""The options of the modes that use a finished run: mode=generate and mode=export. Their recipe is the run's own.

An option is a field with its meaning, range and default, as a recipe's keys are; errors and `--help` are written from
these fields.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator

from launcher.recipe.command_line import OPTIONS, bare, closest, echoed, parse
from launcher.recipe.field_types import NonEmptyText, RecipeSection, dtype_name
from launcher.recipe.fields import assignment, in_words
from launcher.recipe.load import refuse


class RunOptions(RecipeSection):
    """What every mode that uses a finished run is told."""

    run: NonEmptyText = Field(
        description="Folder of the run, of one of its checkpoints, or of its adapter.",
        examples=["./runs/tiny-20260131-120000"],
    )


class GenerateOptions(RunOptions):
    """Answers of the adapter on its NF4 base; without prompt and prompts a chat in the terminal."""

    prompt: NonEmptyText | None = Field(None, description="One message to answer.", examples=["What is a heron?"])
    prompts: NonEmptyText | None = Field(
        None,
        description="File of chats in any format of data.sources, with or without their last answers; the model's own "
        "are written beside it, to FILE.answers.jsonl.",
        examples=["./questions.jsonl"],
    )
    temperature: float = Field(0.0, ge=0, le=10, description="Of sampling; 0: greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens of this total probability.")
    max_tokens: int = Field(256, ge=1, le=131072, description="Tokens of an answer, at most.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of sampling; every answer begins with it.")
    base: bool = Field(False, description="Answer with the adapter off too, side by side.")

    @field_validator("prompts")
    @classmethod
    def _one_of_the_two(cls, prompts: str | None, info: ValidationInfo) -> str | None:
        if prompts and info.data.get("prompt"):
            raise ValueError("prompt and prompts both say what to answer; got both; give one")
        return prompts

    @field_validator("top_p", "seed")
    @classmethod
    def _is_sampled(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("temperature") == 0:
            raise ValueError(f"{info.field_name} needs sampling; got {value:g} and temperature=0; try temperature=0.7")
        return value


class ExportOptions(RunOptions):
    """A model that stock code loads, proved to be the trained one."""

    to: NonEmptyText = Field(description="Folder to write, new or empty.", examples=["./my-model"])
    format: Literal["merged", "adapter", "gguf"] = Field(
        "merged",
        description="merged: a whole model for Transformers; adapter: the adapter, complete by itself; gguf: a file "
        "for llama.cpp and Ollama.",
    )
    on: Literal["dequantised", "original"] = Field(
        "dequantised",
        description="What the update is added to: the NF4 base as training saw it, or the weights of its files.",
    )
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], BeforeValidator(dtype_name)] = Field(
        "auto", description="Of the merged weights; auto: the run's compute dtype, bfloat16 for float32."
    )
    shard_mib: int = Field(4096, ge=1, le=2**20, description="Largest file of merged weights, unless one is larger.")

    quantization: Literal["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"] = Field(
        "f16", description="Of the GGUF file; q6_k, q5_k_m and q4_k_m are made by llama.cpp's llama-quantize."
    )

    @field_validator("on", "dtype", "shard_mib", "quantization")
    @classmethod
    def _belongs(cls, value: str | int, info: ValidationInfo) -> str | int:
        formats = {"on": ("merged", "gguf"), "quantization": ("gguf",)}.get(str(info.field_name), ("merged",))
        given = info.data.get("format", formats[0])
        if given not in formats:
            raise ValueError(
                f"{info.field_name} belongs to format={' and '.join(formats)}; "
                f"got {value} with format={given}; remove it"
            )
        return value


OPTIONS_OF: dict[str, type[RunOptions]] = {"generate": GenerateOptions, "export": ExportOptions}


def read_options(argv: Sequence[str], mode: str) -> RunOptions:
    """The options of `mode`, a key of OPTIONS_OF. Raises RecipeError naming all that is wrong with the command line."""
    kind = OPTIONS_OF[mode]
    arguments = parse(argv, own_options=kind.model_fields)
    for key, value in arguments.overrides:
        near = closest(key.removeprefix("--"), kind.model_fields)
        remedy = f"did you mean {near}?" if near else f"it has {', '.join(kind.model_fields)}"
        arguments.refuse(key, f"mode={mode} has no key {bare(key)}; got {echoed(value)}; {remedy}")
    if recipe := arguments.options["recipe"]:
        arguments.refuse("recipe", f"mode={mode} takes the recipe of its run; got recipe={bare(recipe)}; remove it")
    given = {key: text for key, text in arguments.options.items() if key not in OPTIONS}
    options, schema = None, kind.model_json_schema()["properties"]
    try:
        options = kind.model_validate(given)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            key, got = str(detail["loc"][0]), echoed(detail["input"])
            example = schema[key].get("examples", [schema[key].get("default")])[0]
            if detail["type"] == "value_error":
                problem = str(detail["ctx"]["error"])
            elif detail["type"] == "missing":
                problem = f"{key} must be given; got nothing; try {assignment(key, example)}"
            else:
                problem = f"{key} must be {in_words(schema[key])}; got {got}; try {assignment(key, example)}"
            arguments.refuse(key, problem)
    if arguments.problems or options is None:
        refuse(arguments.problems)
    return options
