"""What mode=evaluate measures on: the run's own data, or other sources read with the run's masks and template."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from launcher.data.chat.encode import Encoder
from launcher.data.chat.workers import EncoderPool
from launcher.data.documents import Document
from launcher.data.pack.fit import fit_rows, notes_on, nothing_left
from launcher.data.read.formats import read_rows
from launcher.data.read.rows import Conversation, Row
from launcher.data.read.sources import open_source
from launcher.data.read.unused import unused_notes
from launcher.data.vocabulary import check_ids
from launcher.errors import DataError
from launcher.export.load_run import OpenedRun
from launcher.export.prompts import Prompt, prompt_of_row
from launcher.export.write import prepared_data
from launcher.recipe.run_options import EvaluateOptions
from launcher.records.counts import counts_in_words
from launcher.runtime.ranks import rank_info

LEFT_OUT = ("rows_dropped", "pieces_dropped", "truncated")  # beginnings of the counts that notes tell


@dataclass(frozen=True)
class EvaluatedData:
    """Documents, each once, and what is said of them."""

    documents: list[Document]
    name: str
    rows: int | None  # None where they are not known
    loss_on: dict[str, int]  # rows by what the loss sees of them; empty where it is not known
    prompts: list[Prompt]  # rows that are answered
    counts: dict[str, int]  # of given data: what was read and left out
    is_the_runs: bool  # whether the run measured its eval loss on exactly this
    notes: tuple[str, ...] = ()


def read_evaluated(run: OpenedRun, options: EvaluateOptions) -> EvaluatedData:
    """Raises DataError as the data of a run does, RecipeError for the own data of an unfinished run."""
    data = _given(run, options) if options.data else _own(run, options)
    for document in data.documents:
        check_ids(document.input_ids, tokenizer=run.tokenizer, vocabulary=run.config.vocab_size)
    return data


def _own(run: OpenedRun, options: EvaluateOptions) -> EvaluatedData:
    """The validation data, else the training data; of a stream its first window."""
    prepared = prepared_data(run, instead=" Or give data=PATH.")
    recipe, place, notes = run.place.recipe.data, run.place, list[str]()
    held_out = prepared.validation is not None
    blocks = prepared.validation if prepared.validation is not None else prepared.first_blocks
    numbers = np.unique(blocks.block_documents).tolist()
    kept = numbers[: options.max_rows]
    if not held_out:
        part = "the first window of its training data" if recipe.streaming else "its training data"
        notes.append(f"the run has no validation data: {part} is evaluated")
    if len(kept) < len(numbers):
        notes.append(f"max_rows: the first {len(kept):,} of {len(numbers):,} documents; the others are left out")
    told = {n: c for n, c in prepared.counts.items() if not recipe.streaming or n.startswith("validation_")}
    if changed := [name for name, count in told.items() if place.counts.get(name) != count]:
        was, now = place.counts.get(changed[0]), prepared.counts[changed[0]]
        notes.append(f"the run's data has changed since: {changed[0]} {was} then, {now} now; not compared with the run")
    kinds = list(prepared.loss_on)
    rows = len(kept) if recipe.too_long != "split" else None
    known = rows is not None and len(kinds) == 1 and recipe.validation_source is None
    return EvaluatedData(
        [blocks.documents[number] for number in kept],
        f"the run's own {'validation' if held_out else 'training'} data",
        rows,
        {kinds[0]: rows} if known and rows is not None else {},
        [Prompt(example.prompt_ids, example.expected) for example in prepared.examples[: options.samples]],
        {},
        is_the_runs=held_out and len(kept) == len(numbers) and not changed,
        notes=tuple(notes),
    )


def _given(run: OpenedRun, options: EvaluateOptions) -> EvaluatedData:
    """Sources read as the run reads its own; the saved tokenizer has the template of data.template."""
    changes = {"sources": options.data, "streaming": False, "template": "auto", "validation": 0.0}
    data = run.place.recipe.data.model_copy(update=changes)
    opened = [open_source(source, data=data) for source in data.sources]
    feeds = list(chain.from_iterable(source.feeds for source in opened))
    counts, loss_on = Counter[str](), Counter[str]()
    documents, prompts, read = list[Document](), list[Prompt](), 0
    encoder = Encoder(run.tokenizer, data=data, stop_ids=run.stop_ids)
    with closing(EncoderPool(encoder, workers=rank_info().cores)) as pool:
        every = read_rows(feeds, data=data, counts=counts)
        rows = islice(every, options.max_rows)
        for fitted in fit_rows(pool.encode(rows), counts, data=data, seed=run.place.recipe.train.seed):
            read += 1
            if fitted.documents:
                documents += fitted.documents
                loss_on[fitted.loss_on] += 1
                prompts += _answerable(fitted.row) if len(prompts) < options.samples else []
    counts = counts.copy()  # what is counted from here on is of a row that is not evaluated
    more = read == options.max_rows and _has_more(every)
    if not documents:
        raise nothing_left(feeds, counts)
    notes = [note for source in opened for note in source.notes]
    if dropped := {name: count for name, count in counts.items() if count and name.startswith(LEFT_OUT)}:
        notes.append(counts_in_words(dropped))
    if more:
        notes.append(f"max_rows: only the first {read:,} rows were read; those after them are left out")
    return EvaluatedData(
        documents,
        ", ".join(source.path for source in data.sources),
        sum(loss_on.values()),
        dict(loss_on),
        prompts,
        {name: count for name, count in counts.items() if count},
        is_the_runs=False,
        notes=(*notes, *notes_on(counts), *unused_notes(counts)),
    )


def _has_more(rows: Iterator[Row]) -> bool:
    try:
        return next(rows, None) is not None
    except DataError:  # a row at fault is a row
        return True


def _answerable(row: Row) -> list[Prompt]:
    """The row as a prompt with the answer that it ends with; none of one that has no such answer."""
    if not isinstance(row, Conversation) and not row.answer:
        return []
    prompt = prompt_of_row(row)
    return [prompt] if prompt.expected is not None else []
