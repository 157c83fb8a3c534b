"""The recipe that recipe=new proposes: each value with its reason, by the rules of docs/choosing.md."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from launcher import __version__
from launcher.errors import RecipeError
from launcher.memory.forecast import Shapes, forecast, optimizer_bytes
from launcher.memory.ledger import MIB
from launcher.memory.policy import KEPT, choose_policy
from launcher.model.family_choice import family_of
from launcher.model.layer_kinds import attention_needs
from launcher.model.load import empty_model
from launcher.model.logits import logit_bytes, logits_rule
from launcher.model.sizes import adapter_parameters, step_sizes, weight_bytes
from launcher.ops.chunk_sizes import chunk_rows
from launcher.recipe.own_recipe import schema_line
from launcher.recipe.schema import Recipe
from launcher.recipe.yaml_lines import inline
from launcher.report.pages.formatting import counted

LENGTHS = (
    16,
    32,
    64,
    128,
    256,
    512,
    1024,
    2048,
    4096,
    8192,
)  # of a block; activations grow with it
LEAST_LENGTH = 256  # unless the model takes no more
STEP_TOKENS = 4096  # in the middle of the 2k to 8k that the shipped recipes use
MICRO_TOKENS = {True: 4096, False: 2048}  # of a forward pass, by whether the model is small
TINY_MODEL, SMALL_MODEL, BIG_MODEL = 1e8, 2e9, 7e9  # parameters
EPOCHS = ((2_000, 3), (10_000, 2))  # up to so many rows; 1 beyond
RANKS = ((10_000, 16), (30_000, 32), (100_000, 64))  # up to so many rows; 128 beyond
CARDS_GB = (8, 12, 16, 24, 48, 80)
CONTEXT_MIB = 600  # of a card, that CUDA and the driver take


@dataclass(frozen=True)
class DataFacts:
    """What was found in the data."""

    path: str  # as the recipe is to name it
    files: str  # which files of a folder are read
    format: str
    rows: int  # usable
    faulty: Counter[str]  # rows_dropped_<reason>
    lengths: Sequence[int]  # tokens of the rows, or of a sample of them
    by_tokenizer: bool  # else they are estimated
    loss_on: Counter[str]  # rows of the sample by what the loss sees
    template: str  # data.template
    validation: str | None  # where the data brings validation files along


@dataclass(frozen=True)
class ModelFacts:
    """The model, and transformers' config of it where this machine has one."""

    name: str
    config: Any


class Proposed(NamedTuple):
    key: str  # dotted
    value: Any
    reason: str


def recipe_text(data: DataFacts, model: ModelFacts) -> str:
    """The recipe as YAML with comments."""
    empty = empty_model(model.config) if model.config else None
    parameters = sum(parameter.numel() for parameter in empty.parameters()) if empty else None
    proposals = list(_proposals(data, model, parameters))
    tree: dict[str, dict[str, Any]] = {}
    for key, value, _ in proposals:
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    recipe = Recipe.model_validate(tree)
    head = [*_found(data, model), *(_memory(recipe, model.config, empty) if empty else [_UNKNOWN_MODEL])]
    lines = [schema_line(), *(f"# {' '.join(line.split())}" for line in head)]  # a file's name may hold line breaks
    section = ""
    for key, value, reason in proposals:
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines += ["", f"{section}:"]
        lines.append(f"  {key.partition('.')[2]}: {inline(value)} # {reason}")
    return "\n".join(lines) + "\n"


_UNKNOWN_MODEL = "Memory: no forecast without the model's config.json, which is not here; docs/memory.md has a table."


def _found(data: DataFacts, model: ModelFacts) -> Iterator[str]:
    lengths, rows = np.array(data.lengths), f"{data.rows:,} rows"
    yield f"Trains {model.name} on {rows}; every value is yours to change, its reason stands beside it."
    yield f"Proposed by qlora-launcher {__version__} recipe=new, by the rules of docs/choosing.md."
    drawn = f"{len(lengths):,} rows drawn at random" if len(lengths) < data.rows else "all rows"
    how = "the model's tokenizer" if data.by_tokenizer else "estimated at 3 characters a token, without tokenizer"
    marks = ", ".join(f"{mark} % up to {_quantile(lengths, mark):,}" for mark in (50, 90, 95, 99))
    yield f"Tokens of a row ({drawn}; {how}):"
    yield f"{lengths.min():,} to {lengths.max():,}; {marks}."
    if data.files:
        yield f"Files: {data.files}"
    if data.faulty:
        reasons = ", ".join(f"{n:,} {key.removeprefix('rows_dropped_')}" for key, n in data.faulty.items())
        yield f"Rows that cannot be used: {reasons}; mode=train with data.bad_rows=raise names the first."


def _quantile(lengths: Any, percent: float) -> int:
    return int(np.quantile(lengths, percent / 100, method="higher"))


def _proposals(data: DataFacts, model: ModelFacts, parameters: int | None) -> Iterator[Proposed]:
    lengths = np.array(data.lengths)
    width, why_width = _width(lengths, model.config)
    yield Proposed("model.name", model.name, "hub id, or a folder; ./ is relative to this file")
    rank = next((rank for rows, rank in RANKS if data.rows < rows), 128)
    yield Proposed("lora.r", rank, f"the adapter needs room for what {data.rows:,} rows teach")
    yield Proposed("lora.alpha", 2 * rank, "twice the rank keeps the strength of the update")
    yield from _of_data(data, lengths, width, why_width)
    yield from _of_training(data, lengths, width, parameters)


def _width(lengths: Any, config: Any) -> tuple[int, str]:
    """data.max_length: the narrowest that holds 99 of 100 rows, and that the model takes."""
    if config is not None:
        family_of(config, max_length=LENGTHS[0])  # refuses a model that no length makes trainable
    widths = [width for width in LENGTHS if config is None or _takes(config, width)]
    wanted = _quantile(lengths, 99)
    width = next((width for width in widths if width >= max(wanted, LEAST_LENGTH)), widths[-1])
    cut = float(np.mean(lengths > width))
    verb = "holds" if wanted <= width else "does not hold"
    longer = f"{100 * cut:.1f} % are longer" if cut else "none is longer"
    return width, f"{verb} 99 % of the rows whole; {longer}"


def _takes(config: Any, width: int) -> bool:
    try:
        family_of(config, max_length=width)
    except RecipeError:
        return False
    return True


def _of_data(data: DataFacts, lengths: Any, width: int, why_width: str) -> Iterator[Proposed]:
    source = {"path": data.path, "format": data.format}
    yield Proposed("data.sources", [source], f"{data.rows:,} rows, recognised as {data.format} by their columns")
    if data.template != "auto":
        yield Proposed("data.template", data.template, "the tokenizer has no chat template, and the tokens of this one")
    yield Proposed("data.max_length", width, why_width)
    if data.format in ("text", "tokens") and lengths.max() > width:
        yield Proposed("data.too_long", "split", "of a plain text every piece teaches; truncate would lose the rest")
    mean = float(np.minimum(lengths, width).mean())
    shared = round(width / mean)
    rows = f"about {shared:,} rows share a block" if shared > 1 else "a row fills about one block"
    yield Proposed("data.batching", "packed", f"{rows}: no padding")
    seen = " and ".join(sorted(data.loss_on))
    yield Proposed("data.loss_on", "auto", f"here the loss sees: {seen}")
    if data.faulty.total() > data.faulty["rows_dropped_empty"]:
        yield Proposed("data.bad_rows", "skip", "some rows are faulty, see above; raise stops at the first")
    yield Proposed("data.validation", *_validation(data))


def _validation(data: DataFacts) -> tuple[str | float, str]:
    """data.validation and its reason."""
    if data.validation:
        return data.validation, "the folder's own validation files"
    if data.rows < 10:
        return 0.0, "too few rows to hold one out"
    share = 0.1 if data.rows < 500 else 0.05 if data.rows < 20_000 else max(0.001, round(1_000 / data.rows, 3))
    return share, f"about {max(1, round(share * data.rows)):,} rows are held out, enough to see the eval loss rise"


def _of_training(data: DataFacts, lengths: Any, width: int, parameters: int | None) -> Iterator[Proposed]:
    validation = _validation(data)[0]
    share = 1 - validation if isinstance(validation, float) else 1.0
    blocks = max(1, round(data.rows * share * float(np.minimum(lengths, width).mean()) / width))
    step_blocks = max(1, min(STEP_TOKENS // width, blocks // 10))
    micro = max(1, min(MICRO_TOKENS[parameters is not None and parameters < SMALL_MODEL] // width, step_blocks))
    accumulation = max(1, step_blocks // micro)
    epochs = next((epochs for rows, epochs in EPOCHS if data.rows < rows), 1)
    steps = max(1, epochs * blocks // (micro * accumulation))
    yield Proposed(
        "train.epochs", epochs, f"{counted(steps, 'step')} or so on one process; fewer where the eval loss rises"
    )
    yield Proposed("train.micro_batch", micro, f"{micro * width:,} tokens in memory at a time")
    reason = f"{micro * accumulation * width:,} tokens a step, of about {counted(blocks, 'block')} of {width:,}"
    yield Proposed("train.accumulation", accumulation, reason)
    yield Proposed("train.lr", *_rate(parameters))
    if validation and steps >= 20:
        yield Proposed("train.eval_every", max(5, steps // 10), "ten times a run, to see where the eval loss rises")


def _rate(parameters: int | None) -> tuple[float, str]:
    """train.lr and its reason."""
    if parameters is not None and parameters < TINY_MODEL:
        return 2e-3, "of the recipe tiny: a small model needs a higher rate"
    if parameters is not None and parameters >= BIG_MODEL:
        return 1e-4, "of the recipe llama8b, for safety; QLoRA has 2e-4 up to 13B"
    return 2e-4, "QLoRA's own up to 13B"


def _memory(recipe: Recipe, config: Any, model: Any) -> Iterator[str]:
    """What the run's own forecast says of this recipe, in bf16 with the attention of a GPU."""
    dtype, tokens = torch.bfloat16, recipe.train.micro_batch * recipe.data.max_length
    trainable = adapter_parameters(model, recipe.lora)
    itemsize, length = logit_bytes(logits_rule(config), dtype), recipe.data.max_length
    chunk = chunk_rows([tokens], config.vocab_size, recipe.memory.loss_chunk_mib, itemsize=itemsize)
    attention = "capped" if attention_needs(config, max_length=length).softcap else "varlen"
    sizes = step_sizes(config, attention=attention, dtype=dtype, loss_chunk=chunk, trainable=trainable)
    masked, state = length if attention == "capped" else 0, optimizer_bytes(recipe.train.optimizer, recipe.lora.r)
    shapes = Shapes(tokens=tokens, masked=masked, state=state, **sizes)
    held_mib = (weight_bytes(model, recipe.quant, dtype) + 4 * recipe.lora.rank_factor * trainable) / MIB
    peaks = {name: forecast(shapes, kept, held_mib=held_mib) / 1024 for name, kept in KEPT.items()}
    yield "Memory by the forecast of docs/memory.md, GiB at the peak in bf16, by memory.activations:"
    yield ", ".join(f"{name} {gib:.1f}" for name, gib in peaks.items()) + "; auto then takes, by the card's size:"
    by_choice: dict[str, int] = {}  # the smallest card of each
    for card in CARDS_GB:
        policy = choose_policy(recipe, shapes, held_mib=held_mib, free_mib=card * 1024 - CONTEXT_MIB - held_mib)
        by_choice.setdefault("nothing (it is too small)" if "nothing" in policy.why else policy.name, card)
    yield ", ".join(f"from {card} GB on: {choice}" for choice, card in by_choice.items()) + "."
