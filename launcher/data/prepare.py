"""One data section becomes training and validation blocks, with a count for everything that was left out.

open_source       a path or a dataset of the hub -> feeds of records
read_rows         records -> rows: conversations or texts
EncoderPool       rows -> text with spans (chat/render.py) -> token ids and a mask of what the loss sees
fit_rows          -> documents of at most max_length tokens
held_out          -> training rows and validation rows
weighted          -> the rows of an epoch
lay_out           -> blocks, which go into the cache
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from launcher.data import cache
from launcher.data.chat.encode import Encoder
from launcher.data.chat.ends import check_ends
from launcher.data.chat.workers import EncoderPool
from launcher.data.documents import Documents, Longs
from launcher.data.example import Example, find_examples
from launcher.data.pack.blocks import Blocks
from launcher.data.pack.buckets import lay_out
from launcher.data.pack.fit import UsableRows, fit_rows, notes_on, nothing_left
from launcher.data.read.formats import read_rows
from launcher.data.read.rows import Feed, ReadingProgress
from launcher.data.read.sources import OpenedSource, errors_name_validation, open_source, open_validation, unchanged
from launcher.data.read.unused import unused_notes
from launcher.data.splits import held_out, weighted
from launcher.data.stream import Stream
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection
from launcher.runtime.ranks import rank_info

ALL_ALIKE = "data.validation={} holds out nothing: the rows are all alike, or there is only one"
STORED = ("counts", "train_rows", "validation_rows", "loss_on", "template", "notes")  # in a cache entry's meta


@dataclass(frozen=True)
class PreparedData:
    """`train_rows` and `validation_rows` count the rows of the sources that are in the blocks."""

    train: Blocks | Stream
    validation: Blocks | None
    counts: dict[str, int]
    examples: tuple[Example, ...]  # validation rows whose answers a run generates
    train_rows: int
    validation_rows: int
    loss_on: dict[str, int]  # training rows by what the loss sees of them
    template: str  # the chat template's name
    identity: str  # of what the blocks are made from: equal on ranks that read the same data
    content: str  # of the blocks themselves (of a stream, its first window): equal where the same is trained on
    notes: tuple[str, ...] = ()  # for the report

    @property
    def first_blocks(self) -> Blocks:
        """What training begins with: all its rows, or the first window of a stream."""
        return self.train.first_window.blocks if isinstance(self.train, Stream) else self.train

    @property
    def widths(self) -> tuple[int, ...]:
        """The block widths of training and validation, widest first. Each is a planned shape."""
        validation = self.validation.shapes if self.validation else ()
        return tuple(sorted({*self.first_blocks.shapes, *validation}, reverse=True))


@dataclass(frozen=True)
class _Inputs:
    """A data section with its sources opened, and what makes documents of their rows."""

    data: DataSection
    pool: EncoderPool
    train: list[list[Feed]]  # by source
    validation: list[Feed] | None  # of validation data that is a source of its own
    pad_id: int
    seed: int


def prepare(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    stop_ids: Sequence[int] = (),
    progress: ReadingProgress | None = None,
) -> PreparedData:
    """The blocks of a data section: from the cache of an earlier run, or made and cached. The same on every rank.

    Counts: rows_read, rows_dropped_<reason>, pieces_dropped_zero_supervised, truncated and split (rows that were too
    long), empty_assistant_turns (where masked), rows_cut_by_template (it leaves out text of them),
    rows_without_end_token (of an answer), answers by what ends them (records/counts.py), unused_key_<name> and
    dropped_key_<name> (rows with a key that nothing uses), rows_repeated and rows_left_out (by weights), of several
    sources source_<n>_rows_of_an_epoch (n from 1; a repeated row counts each time), documents, tokens and
    supervised_tokens (the targets) for training, validation_documents. Where validation data is a source of its own,
    its other counts have the prefix validation_, and its rows are dropped from training; with a fraction, rows_read =
    train_rows + validation_rows + all dropped rows. Of a stream: what was read for the windows that training has begun
    with. One row, or many equal ones, cannot be split and is all training.

    Raises DataError as sources, formats and chat say, when nothing is left to train on or to validate on, when no
    answer ends with a stop token, and when a local source changes meanwhile: then nothing is cached.
    """
    encoder = Encoder(tokenizer, data=data, stop_ids=stop_ids)
    # Any id will do: padding is a document of its own, without loss.
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    train = [open_source(source, data=data) for source in data.sources]
    validation = open_validation(data)
    opened = [*train, *([validation] if validation is not None else [])]
    identity = cache.fingerprint(
        data,
        identities=[[feed.identity for feed in source.feeds] for source in opened],
        tokenizer=tokenizer,
        seed=seed,
        stop_ids=stop_ids,
    )
    pool = EncoderPool(encoder, workers=rank_info().cores)
    progress = progress or ReadingProgress()
    watched = [[progress.watched(feed) for feed in source.feeds] for source in opened]
    inputs = _Inputs(data, pool, watched[: len(train)], watched[-1] if validation else None, pad_id, seed)
    prepared = _prepared(inputs, identity, opened)
    notes = [*(f"data: {note}" for source in opened for note in source.notes), *unused_notes(prepared.counts)]
    return replace(prepared, notes=(*prepared.notes, *notes))


def _prepared(inputs: _Inputs, identity: str, opened: Sequence[OpenedSource]) -> PreparedData:
    """From the stream, from the cache, or made and cached."""
    if inputs.data.streaming:
        try:
            with unchanged(opened):
                return _prepare_stream(inputs, identity)  # which goes on using the pool
        except BaseException:
            inputs.pool.close()
            raise
    entry = cache.load(identity)
    if entry is not None:
        return _from_entry(entry, identity)
    with closing(inputs.pool), unchanged(opened):
        prepared = _prepare_blocks(inputs, identity)
    entry = _to_entry(prepared)
    note = cache.save(entry, identity)
    return replace(prepared, content=entry.content, notes=(*prepared.notes, *([note] if note else [])))


def _to_entry(prepared: PreparedData) -> cache.Entry:
    meta = {name: getattr(prepared, name) for name in STORED}
    meta["examples"] = [asdict(example) for example in prepared.examples]
    return cache.Entry(prepared.first_blocks, prepared.validation, meta)


def _from_entry(entry: cache.Entry, identity: str) -> PreparedData:
    meta = dict(entry.meta)
    examples = meta.pop("examples")
    return PreparedData(
        entry.train,
        entry.validation,
        examples=tuple(Example(**example) for example in examples),
        identity=identity,
        content=entry.content,
        notes=("data: read from the cache of an earlier run", *meta.pop("notes")),
        **meta,
    )


def _prepare_blocks(inputs: _Inputs, identity: str) -> PreparedData:
    data, counts = inputs.data, Counter[str](truncated=0)
    validation_source = _rows_of_validation_source(inputs, counts)
    excluded = frozenset(validation_source.digests if validation_source else ())
    usable = _usable_rows(inputs.train, inputs, counts, excluded=excluded)
    documents = usable.documents
    if validation_source:
        train_rows, validation_rows = np.arange(len(usable)), np.arange(len(validation_source))
        validation_documents = len(documents) + validation_source.documents_of(validation_rows)
        documents = Documents.of([documents, validation_source.documents])
    else:
        held = held_out(usable.digests, fraction=float(cast(float, data.validation)))
        train_rows, validation_rows = np.flatnonzero(~held), np.flatnonzero(held)
        validation_documents = usable.documents_of(validation_rows)
    epoch = _rows_of_an_epoch(train_rows, usable, inputs, counts)
    train_documents = usable.documents_of(epoch)
    train, validation = lay_out(
        documents, train_documents, validation_documents, data=data, pad_id=inputs.pad_id, seed=inputs.seed
    )
    counts.update(documents=len(train_documents), tokens=train.tokens, supervised_tokens=train.supervised_tokens)
    counts.update(validation_documents=len(validation_documents))
    return PreparedData(
        train=train,
        validation=validation,
        counts=dict(counts),
        examples=_examples(validation_source or usable, validation_rows, inputs),
        train_rows=len(train_rows),
        validation_rows=len(validation_rows),
        loss_on=dict(Counter(usable.loss_on[row] for row in train_rows)),
        template=inputs.pool.encoder.template,
        identity=identity,
        content="",
        notes=_notes_on(counts, inputs.pool.encoder, longest=usable.longest)
        + (() if validation or data.validation == 0 else (ALL_ALIKE.format(data.validation),)),
    )


def _prepare_stream(inputs: _Inputs, identity: str) -> PreparedData:
    """The first window of the stream, and all of the validation data."""
    counts: Counter[str] = Counter()
    usable = _rows_of_validation_source(inputs, counts) or UsableRows()
    rows, validation = np.arange(len(usable)), None
    if len(usable):
        documents = usable.documents
        indices = np.arange(len(documents))
        blocks, _ = lay_out(documents, indices, indices[:0], data=inputs.data, pad_id=inputs.pad_id, seed=inputs.seed)
        validation = blocks.bounded(inputs.data.max_length)  # as the stream's blocks: its longest document is not known
    stream = Stream(
        sources=inputs.train,
        pool=inputs.pool,
        data=inputs.data,
        pad_id=inputs.pad_id,
        seed=inputs.seed,
        excluded=frozenset(usable.digests),
        validation_counts=counts,
        min_max_documents=validation.max_documents if validation else 0,
    )
    return PreparedData(
        train=stream,
        validation=replace(validation, max_documents=stream.max_documents) if validation else None,
        counts=stream.counts,
        examples=_examples(usable, rows, inputs),
        train_rows=0,
        validation_rows=len(rows),
        loss_on=dict(stream.first_window.loss_on),
        template=inputs.pool.encoder.template,
        identity=identity,
        content=cache.Entry(stream.first_window.blocks, None, {}).content,
        notes=(stream.passes_note, *_notes_on(stream.counts, inputs.pool.encoder, longest=stream.first_window.longest)),
    )


def _notes_on(counts: Counter[str], encoder: Encoder, *, longest: int) -> tuple[str, ...]:
    check_ends(counts, encoder.tokenizer, template=encoder.template, data=encoder.data, longest=longest)
    return notes_on(counts)


def _usable_rows(
    sources: Sequence[Sequence[Feed]], inputs: _Inputs, counts: Counter[str], *, excluded: frozenset[bytes]
) -> UsableRows:
    """The rows of the sources that have something to learn. Adds what was read and left out to `counts`.

    Raises DataError: a row is faulty with bad_rows "raise", too long with too_long "raise", or a source has none left.
    """
    data, usable = inputs.data, UsableRows()
    for index, feeds in enumerate(sources):
        counts_before, rows_before = Counter(counts), len(usable)
        encoded = inputs.pool.encode(read_rows(feeds, data=data, counts=counts))
        for fitted in fit_rows(encoded, counts, data=data, seed=inputs.seed, excluded=excluded):
            if fitted.documents:
                usable.add(fitted, source=index)
        if len(usable) == rows_before:
            raise nothing_left(feeds, counts - counts_before)
    return usable


def _rows_of_validation_source(inputs: _Inputs, counts: Counter[str]) -> UsableRows | None:
    if inputs.validation is None:
        return None
    own_counts: Counter[str] = Counter()
    with errors_name_validation():
        usable = _usable_rows([inputs.validation], inputs, own_counts, excluded=frozenset())
    counts.update({f"validation_{name}": count for name, count in own_counts.items()})
    return usable


def _rows_of_an_epoch(rows: Longs, usable: UsableRows, inputs: _Inputs, counts: Counter[str]) -> Longs:
    """All rows once, or as the sources' weights say."""
    sources, weights = np.array(usable.sources)[rows], [source.weight for source in inputs.data.sources]
    if weights[0] is not None:
        by_source = [rows[sources == index] for index in range(len(weights))]
        for source, rows_of_source in zip(inputs.data.sources, by_source, strict=True):
            if not len(rows_of_source):
                raise DataError(
                    f"{source.path}: a source with a weight must have a row to train on; all of its rows validate.\n"
                    f"Found: data.validation={inputs.data.validation}.\n"
                    "Lower it, or name validation data of its own."
                )
        rows, repeated, left_out = weighted(by_source, [weight or 0.0 for weight in weights], seed=inputs.seed)
        counts.update(rows_repeated=repeated, rows_left_out=left_out)
    if len(weights) > 1:
        rows_of_sources = np.bincount(np.array(usable.sources)[rows], minlength=len(weights))
        counts.update({f"source_{n}_rows_of_an_epoch": int(count) for n, count in enumerate(rows_of_sources, 1)})
    return rows


def _examples(usable: UsableRows, rows: Longs, inputs: _Inputs) -> tuple[Example, ...]:
    """Conversations of these rows, which validate."""
    feeds = inputs.validation if inputs.validation is not None else chain.from_iterable(inputs.train)
    digests = (usable.digests[row] for row in rows.tolist() if usable.is_chat[row])
    encoder, max_length = inputs.pool.encoder, inputs.data.max_length
    return find_examples(feeds, digests, encoder=encoder, max_length=max_length, seed=inputs.seed)
