"""The recipe's data section: what is trained on, and how rows become blocks of tokens."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from launcher.credentials import masked
from launcher.recipe.field_types import NonEmptyText, RecipeSection, number_before_path, off_is, recipes_dir


class Source(RecipeSection):
    """Where rows come from: a file, a folder of files or a dataset of the hub."""

    model_config = ConfigDict(
        json_schema_extra={"type": ["object", "string"]}
    )  # a text is its path: fields.py's as_list

    path: NonEmptyText = Field(
        description="File (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt), folder of such files, or dataset id on "
        "the hub.",
        examples=["./my.jsonl"],
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokens"] = Field(
        "auto", description="Columns of the rows; auto: recognised from the first row."
    )
    weight: float | None = Field(
        None, gt=0, description="Share of an epoch's rows, relative to the other weights; all sources have one or none."
    )
    config: NonEmptyText | None = Field(None, description="Configuration of a hub dataset.", examples=["default"])
    split: NonEmptyText | None = Field(
        None, description="Split of a hub dataset, or of a folder by its files' names; null: train.", examples=["train"]
    )
    revision: NonEmptyText | None = Field(
        None, description="Branch, tag or commit of a hub dataset.", examples=["main"]
    )
    columns: dict[NonEmptyText, NonEmptyText] | None = Field(
        None,
        description="Our names of columns and of messages' keys, each with its name in the data.",
        examples=[{"prompt": "question", "completion": "answer"}],
    )
    template: NonEmptyText | None = Field(
        None,
        description="Jinja line that makes a text of a row's columns; with completion: the prompt.",
        examples=["Q: {{ question }} A:"],
    )
    completion: NonEmptyText | None = Field(
        None, description="Jinja line of what is learned after the template's text.", examples=[" {{ answer }}"]
    )
    delimiter: Annotated[str, Field(pattern=r'^[^"\r\n]$', description="one character, no quote")] | None = Field(
        None,
        description="Character between the columns of .csv and .tsv files; null: told from the header.",
        examples=[";"],
    )

    @model_validator(mode="after")
    def _template_makes_the_format(self) -> Self:
        made = "text" if self.completion is None else "prompt_completion"
        if self.template is None and self.completion is not None:
            raise ValueError("completion of a source needs template, which makes the prompt; add it, or use columns")
        if self.template is not None and self.format not in ("auto", made):
            raise ValueError(
                f"template of a source makes rows of the format {made}; got format {self.format}; leave format out"
            )
        return self


class DataSection(RecipeSection):
    """What is trained on, and how rows become blocks of tokens."""

    sources: list[Source] = Field(
        default_factory=lambda: [Source(path=str(recipes_dir() / "tiny" / "train.jsonl"))],
        min_length=1,
        description="Training data: paths, or entries with a path; giving it replaces the recipe's.",
        examples=["./my.jsonl"],
        json_schema_extra={"type": ["array", "object", "string"]},
    )
    streaming: bool = Field(
        False,
        description="Read while training, for data larger than the disk; needs train.steps and separate validation.",
    )
    template: Literal["auto", "llama3", "chatml", "mistral", "gemma", "qwen3"] = Field(
        "auto", description="Chat template; auto: the tokenizer's own, others ship here for tokenizers without one."
    )
    batching: Literal["packed", "bucketed", "padded"] = Field(
        "packed",
        description="Documents share blocks; or each is a block, padded to one of up to 6 lengths or to max_length.",
    )
    max_length: int = Field(2048, ge=16, le=131072, description="Tokens of a block, and the most of a document.")
    loss_on: Literal["auto", "assistant", "completion", "all", "last"] = Field(
        "auto",
        description="Supervised tokens; auto: assistant in chats, completion where there is a prompt, all in texts. "
        "last: the last turn of the assistant alone.",
    )
    bad_rows: Literal["raise", "skip"] = Field(
        "raise", description="A row that cannot be read stops the run, or is skipped and counted."
    )
    unused: Literal["raise", "drop"] = Field(
        "raise",
        description="A key that would change what is learned but is not honoured (loss_mask, images, rejected) "
        "makes its row faulty, or is left out and counted.",
    )
    max_row_mib: float = Field(
        8, ge=0.001, le=1024, description="MiB of the largest row that is read; a larger one is faulty."
    )
    too_long: Literal["truncate", "split", "drop", "raise"] = Field(
        "truncate", description="What happens to a document longer than max_length; counted."
    )
    validation: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | NonEmptyText | Source, BeforeValidator(number_before_path), off_is(0.0)
    ] = Field(
        0.05,
        description="Fraction of the rows held out (0: none), or validation data: a path, or an entry like a source's.",
        examples=["./validation.jsonl"],
        validate_default=True,
    )
    wait_s: int = Field(
        3600,
        ge=1,
        description="Seconds that ranks wait at the start: for the one that prepares the data, and for all to come.",
    )

    @property
    def max_row_bytes(self) -> int:
        return round(self.max_row_mib * 2**20)

    @property
    def validation_source(self) -> Source | None:
        """The validation data, where it is data of its own."""
        given = self.validation
        return Source(path=given) if isinstance(given, str) else given if isinstance(given, Source) else None

    @field_validator("sources")
    @classmethod
    def _all_weights_or_none(cls, sources: list[Source]) -> list[Source]:
        without = [source.path for source in sources if source.weight is None]
        if 0 < len(without) < len(sources):
            raise ValueError(
                f"data.sources: either all have a weight or none; {masked(without[0])[-60:]} has none; give it one"
            )
        return sources

    @field_validator("batching")
    @classmethod
    def _lengths_are_known(cls, batching: str, info: ValidationInfo) -> str:
        if batching == "bucketed" and info.data.get("streaming"):
            raise ValueError(
                "data.batching=bucketed must know all lengths, which data.streaming cannot; try data.batching=packed"
            )
        return batching

    @field_validator("validation")
    @classmethod
    def _rows_are_known(cls, validation: float | str | Source, info: ValidationInfo) -> float | str | Source:
        if isinstance(validation, Source) and validation.weight is not None:
            raise ValueError(
                f"data.validation has no weight: all of it validates; got {validation.weight:g}; leave it out"
            )
        if info.data.get("streaming") and isinstance(validation, float) and validation:
            raise ValueError(
                "data.validation must be data of its own, or 0, with data.streaming; try data.validation=0"
            )
        return validation
