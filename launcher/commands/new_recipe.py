"""recipe=copy and recipe=new: a recipe of the user's own, and what to run with it.

recipe=new reads all rows and the lengths of some, with the model's tokenizer where this machine has it. Nothing is
downloaded but data that is a dataset of the hub.
"""

import os
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.data.read.formats import RENAME, detected_format, read_rows
from launcher.data.read.rows import Conversation, Feed, ReadingProgress, Row, RowFault, TokenIds
from launcher.data.read.sources import local_files, open_source
from launcher.errors import DataError
from launcher.model.config_file import check_config_file
from launcher.preflight.before_torch import check_data
from launcher.recipe.data_section import DataSection, Source
from launcher.recipe.field_types import HUB_ID, recipes_dir
from launcher.recipe.locate import config_file, locate
from launcher.recipe.own_recipe import OWN_RECIPES, CopyOptions, NewOptions, copy_recipe, next_steps, target, write_own
from launcher.recipe.run_options import read_form
from launcher.recipe.schema import ModelSection
from launcher.records.run import Phase
from launcher.report import Screen
from launcher.runtime.clock import seconds_since
from launcher.runtime.environment import prepare_environment, quick_imports
from launcher.runtime.failures import classified
from launcher.runtime.ranks import RankInfo

SAMPLE_ROWS = 5_000  # of which lengths are counted: a second of work; 50 of them are longer than the 99th percentile
RENAME_IN_FILE = (  # data= names a file alone
    "Rename the columns in the file, or write the recipe by hand: recipe=copy, then in data.sources "
    "columns: {prompt: question, completion: answer} beside the path."
)
CHARACTERS_A_TOKEN, TOKENS_A_MESSAGE = 3, 8  # where no tokenizer is at hand: English has 4, other languages fewer


def own_recipe(argv: Sequence[str], word: str, info: RankInfo, console: Console) -> None:
    """Write what recipe=copy or recipe=new asks for. Raises RecipeError and DataError; then no file is left."""
    options = read_form(argv, f"recipe={word}", OWN_RECIPES[word])
    if not info.is_main:  # one process writes
        return
    if isinstance(options, CopyOptions):
        path = copy_recipe(options)
    else:
        path = target(options.to)
        text = _new_text(options, path, info, console)
        write_own(path, text)
        console.out(text, highlight=False)
    console.out(f"wrote {path}\nnext:\n{next_steps(path)}", highlight=False)


def _new_text(options: NewOptions, path: Path, info: RankInfo, console: Console) -> str:
    source = Source(path=options.data, format=options.format)
    check_data(source)
    prepare_environment()
    tokenizer_folder, config_folder = _model_folders(options.model)
    with Screen(console, clock=seconds_since()) as screen, classified(info):
        screen.show("importing torch")
        with quick_imports():
            from launcher.commands.proposal import DataFacts, ModelFacts, recipe_text
            from launcher.data.chat.named_templates import fitting_templates
            from launcher.model.load import load_config, load_tokenizer

        progress = ReadingProgress()
        screen.show(Phase("reading the data", progress))
        format, rows, sample, faulty = _read(source, progress)
        screen.show("counting tokens")
        section = ModelSection(name=options.model)
        config = load_config(str(config_folder), section) if config_folder else None
        tokenizer = load_tokenizer(str(tokenizer_folder), section, stand_in=Path()) if tokenizer_folder else None
        template = "auto"
        if tokenizer and not tokenizer.chat_template and any(isinstance(row, Conversation) for row in sample):
            template = next(iter(fitting_templates(tokenizer)), "auto")
        lengths, losses = _lengths(sample, tokenizer, DataSection(template=template), faulty)
        data = DataFacts(
            path=_named(options.data, path.parent),
            files=local_files(source).note,
            format=format,
            rows=rows,
            faulty=faulty,
            lengths=lengths,
            by_tokenizer=tokenizer is not None,
            loss_on=losses,
            template=template,
            validation=_named(options.data, path.parent) if _brings_validation(source) else None,
        )
        return recipe_text(data, ModelFacts(_named(options.model, path.parent), config))


def _model_folders(name: str) -> tuple[Path | None, Path | None]:
    """Folders of the model's tokenizer and of its config.json, as far as this machine has them. RecipeError for a local
    folder that is not there, or an architecture that cannot be trained."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir() or name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        there = Path(locate(ModelSection(name=name), recipes_dir() / "architectures"))
        check_config_file(there / "config.json", max_length=16)
        return there, there
    from huggingface_hub import try_to_load_from_cache

    cached, file = try_to_load_from_cache(name, "tokenizer.json"), config_file(name, None)
    shipped = recipes_dir() / "architectures" / name.rpartition("/")[2]
    config = file.parent if file else shipped if shipped.is_dir() else None
    if config:
        check_config_file(config / "config.json", max_length=16)
    return Path(cached).parent if isinstance(cached, str) else None, config


def _read(source: Source, progress: ReadingProgress) -> tuple[str, int, list[Row], Counter[str]]:
    """The format, the number of usable rows, some of them drawn evenly, and the others by why they are left out."""
    data = DataSection(sources=[source], bad_rows="skip")
    feeds = [progress.watched(feed) for feed in open_source(source, data=data).feeds]
    counts, sample, draw = Counter[str](), list[Row](), random.Random(0)
    for number, row in enumerate(read_rows(feeds, data=data, counts=counts)):
        if number < SAMPLE_ROWS:
            sample.append(row)
        elif (place := draw.randrange(number + 1)) < SAMPLE_ROWS:  # reservoir sampling: every row is as likely
            sample[place] = row
    if not sample:
        try:
            for _ in read_rows(feeds, data=DataSection(sources=[source]), counts=Counter()):  # raises why
                pass
        except RowFault as fault:
            raise DataError(str(fault).replace(RENAME, RENAME_IN_FILE)) from None
        raise DataError(f"{source.path}: data needs rows; all of it is empty.\nName another file, or fill it.")
    format = source.format if source.format != "auto" else _format_of(feeds)
    rows = counts["rows_read"] - sum(count for key, count in counts.items() if key.startswith("rows_dropped"))
    return format, rows, sample, Counter({k: n for k, n in counts.items() if k.startswith("rows_dropped")})


def _format_of(feeds: Sequence[Feed]) -> str:
    """The format of the first row that has one, as read_rows finds it."""
    for raw in chain.from_iterable(feed.raw_rows() for feed in feeds):
        with suppress(RowFault):
            if not isinstance(raw, RowFault):
                return detected_format(raw.fields, raw.where)
    raise AssertionError("a row was read")


def _lengths(
    sample: Sequence[Row], tokenizer: Any, data: DataSection, faulty: Counter[str]
) -> tuple[list[int], Counter[str]]:
    """Tokens of each row, and rows by what the loss sees of them; rows that the template refuses go to `faulty`."""
    from launcher.data.chat.encode import Encoder, resolve_loss_on

    losses = Counter(resolve_loss_on(row, "auto") for row in sample)
    if tokenizer is None:
        return [_estimated(row) for row in sample], losses
    documents = [encoded.document for encoded in Encoder(tokenizer, data=data).encode(sample)]
    faults = [document for document in documents if isinstance(document, RowFault)]
    if len(faults) == len(documents):
        raise faults[0]
    faulty.update(f"rows_dropped_{fault.reason}" for fault in faults)
    return [len(document) for document in documents if not isinstance(document, RowFault)], losses


def _estimated(row: Row) -> int:
    if isinstance(row, TokenIds):
        return len(row.input_ids)
    messages = len(row.messages) if isinstance(row, Conversation) else 0
    return row.characters // CHARACTERS_A_TOKEN + messages * TOKENS_A_MESSAGE + 1


def _brings_validation(source: Source) -> bool:
    """Whether the source is a folder that has validation files beside those for training."""
    training, validation = (set(local_files(source, validates=validates).files) for validates in (False, True))
    return bool(validation) and training.isdisjoint(validation)


def _named(path: str, folder: Path) -> str:
    """A local path as a recipe in `folder` names it: from there if it lies below, else absolute. A hub id as it is."""
    there = Path(os.path.normpath(Path(os.path.expanduser(path)).absolute()))
    if not there.exists():
        return path
    return f"./{there.relative_to(folder)}" if there.is_relative_to(folder) else str(there)
