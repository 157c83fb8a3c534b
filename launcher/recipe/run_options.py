"""The options of the modes that use finished runs. Their recipe is the run's own.

An option is a field with its meaning, range and default, as a recipe's keys are; errors and `--help` are written from
these fields.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from glob import glob, has_magic
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator

from launcher.errors import RecipeError
from launcher.recipe.command_line import OPTIONS, bare, closest, echoed, parse
from launcher.recipe.data_section import Source
from launcher.recipe.field_types import NonEmptyText, RecipeSection, dtype_name
from launcher.recipe.fields import as_list, assignment, in_words
from launcher.recipe.load import refuse
from launcher.recipe.yaml_lines import read_value


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
        description="File of bare prompts, or of chats in any format of data.sources, with or without their last "
        "answers; the model's own are written beside it, to FILE.answers.jsonl.",
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


class PushOptions(RunOptions):
    """A trained model with its card, to a repository of the hub; the token is the login's or HF_TOKEN."""

    run: NonEmptyText = Field(
        description="Folder of the run, whose adapter is pushed, or a folder that mode=export wrote.",
        examples=["./runs/tiny-20260131-120000"],
    )
    to: NonEmptyText = Field(description="Repository on the hub.", examples=["me/my-adapter"])
    private: bool = Field(True, description="Only you and those whom you let may read the repository.")
    unproven: bool = Field(False, description="Push although a verdict does not hold; the card says which.")

    @field_validator("to")
    @classmethod
    def _is_repository(cls, to: str) -> str:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        with suppress(HFValidationError):
            validate_repo_id(to)
            if "/" in to:
                return to
        rule = "to must be owner/name: letters, digits, and - _ . between them, at most 96"
        raise ValueError(f"{rule}; got {echoed(to)}; try to=me/my-adapter")


def _sources(value: Any) -> Any:
    """A text as data.sources takes it on the command line."""
    if not isinstance(value, str):
        return value
    try:
        given = read_value(value) if value[:1] in ("[", "{") else [value] if os.path.exists(value) else value
    except RecipeError as error:
        raise ValueError(f"data: {error}; got {echoed(value)}; put the argument in single quotes") from None
    return as_list("data.sources", given)


class EvaluateOptions(RunOptions):
    """Loss, perplexity and token accuracy of the adapter on its NF4 base."""

    data: Annotated[list[Source], Field(min_length=1), BeforeValidator(_sources)] | None = Field(
        None,
        description="Data to evaluate, as data.sources; without it the run's validation data, or where it has none its "
        "training data.",
        examples=["./questions.jsonl"],
    )
    base: bool = Field(False, description="Evaluate with the adapter off too, side by side.")
    samples: int = Field(0, ge=0, le=1000, description="Rows that are answered, beside the data's own answers.")
    max_rows: int | None = Field(None, ge=1, description="Rows that are evaluated, at most: the first ones.")

    @field_validator("data")
    @classmethod
    def _are_not_weighted(cls, data: list[Source] | None) -> list[Source] | None:
        if any(source.weight is not None for source in data or ()):
            raise ValueError("data: a weight repeats rows or leaves them out, here each counts once; remove weight")
        return data


class ReportOptions(RunOptions):
    """A run as it was shown at its end; one that has no report with what there is of it."""

    html: NonEmptyText | None = Field(
        None, description="File for the page that a browser shows.", examples=["./report.html"]
    )


def folders_of(value: Any) -> Any:
    """The entries of a list as text; one with * ? or [ that is no path stands for the folders that it matches."""
    try:
        read = read_value(value) if isinstance(value, str) else value
    except RecipeError as error:
        raise ValueError(f"runs: {error}; got {echoed(value)}; put the list in single quotes") from None
    names = [str(name) for name in (read if isinstance(read, list) else [read])]
    return [folder for name in names for folder in _matches(name)]


def _matches(name: str) -> list[str]:
    path = os.path.expanduser(name)
    if not has_magic(name) or os.path.exists(path):
        return [name]
    if not (folders := sorted(glob(f"{path}/"))):
        raise ValueError(f"runs: a pattern must match a folder; got {echoed(name)}, which matches none; correct it")
    return folders


class CompareOptions(RecipeSection):
    """Finished runs side by side: what differs in their recipes, losses at equal steps, speed, memory, verdicts."""

    runs: Annotated[list[NonEmptyText], BeforeValidator(folders_of)] = Field(
        min_length=2,
        max_length=26,
        description="Folders of the runs, or patterns of such.",
        examples=[["./runs/first", "./runs/second"]],
    )


OPTIONS_OF: dict[str, type[RecipeSection]] = {
    "generate": GenerateOptions,
    "export": ExportOptions,
    "push": PushOptions,
    "evaluate": EvaluateOptions,
    "report": ReportOptions,
    "compare": CompareOptions,
}


Options = TypeVar("Options", bound=RecipeSection)


def read_options(argv: Sequence[str], mode: str) -> RecipeSection:
    """The options of `mode`, a key of OPTIONS_OF. Raises RecipeError naming all that is wrong with the command line."""
    return read_form(argv, f"mode={mode}", OPTIONS_OF[mode])


def read_form(argv: Sequence[str], form: str, kind: type[Options]) -> Options:
    """The options of a command line that begins with `form`, "mode=MODE" or "recipe=WORD".

    Raises RecipeError naming all that is wrong with it.
    """
    schema = kind.model_json_schema()["properties"]
    arguments = parse(argv, own_options=schema)
    for key, value in arguments.overrides:
        near = closest(key.removeprefix("--"), schema)
        remedy = f"did you mean {near}?" if near else f"it has {', '.join(schema)}"
        arguments.refuse(key, f"{form} has no key {bare(key)}; got {echoed(value, key)}; {remedy}")
    for key in ("recipe", "mode", "report"):
        value = arguments.options[key]
        if value == OPTIONS[key] or f"{key}={value}" == form or (key, form[:5]) == ("report", "mode="):
            continue
        rule = "takes the recipe of its run" if key == "recipe" else "runs nothing and writes no report"
        arguments.refuse(key, f"{form} {rule}; got {key}={bare(value)}; remove it")
    given = {key: text for key, text in arguments.options.items() if key not in OPTIONS}
    options = None
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
