"""One data section becomes training and validation blocks, with a count for everything that was left out.

read -> one kind of row -> render and mask -> fit -> split -> weigh -> lay out      (and into the cache)
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from launcher.data import cache
from launcher.data.chat.encode import Encoder
from launcher.data.documents import Documents, Longs
from launcher.data.pack.blocks import Blocks
from launcher.data.pack.buckets import lay_out
from launcher.data.pack.fit import Encoded, Fitter, encode_sources
from launcher.data.read.formats import read_rows
from launcher.data.read.rows import Conversation, RowFault
from launcher.data.read.sources import Feed, open_source
from launcher.data.splits import held_out, weighted
from launcher.data.stream import Stream
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection, Source


@dataclass(frozen=True)
class Example:
    """A validation conversation up to its last assistant turn, rendered with generation prompt, and its answer."""

    prompt_ids: list[int]
    prompt: str
    expected: str


@dataclass(frozen=True)
class PreparedData:
    """`train_rows` and `validation_rows` count the rows of the sources that are in the blocks."""

    train: Blocks | Stream
    validation: Blocks | None
    counts: dict[str, int]
    example: Example | None
    train_rows: int
    validation_rows: int
    loss_on: dict[str, int]  # training rows by what the loss sees of them
    template: str  # the chat template's name
    identity: str  # of what the blocks are made from: equal on ranks that read the same data alike
    notes: tuple[str, ...] = ()  # for the report

    @property
    def first_blocks(self) -> Blocks:
        """What training begins with: all its rows, or the first window of a stream."""
        return self.train.first if isinstance(self.train, Stream) else self.train

    @property
    def widths(self) -> tuple[int, ...]:
        """The block widths of training and validation, widest first. Each is a planned shape."""
        validation = self.validation.shapes if self.validation else ()
        return tuple(sorted({*self.first_blocks.shapes, *validation}, reverse=True))


@dataclass(frozen=True)
class _Job:
    """A data section with its sources opened."""

    data: DataSection
    encoder: Encoder
    train: list[list[Feed]]
    validation: list[Feed] | None  # of its own source
    pad_id: int
    seed: int

    def fitter(self, validating: Encoded | None) -> Fitter:
        """Makes documents of rows, but of none that validates."""
        without = validating.digests if validating else ()
        return Fitter(self.encoder, data=self.data, seed=self.seed, without=without)


def prepare(data: DataSection, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreparedData:
    """Reads, renders, masks, splits, lays out; or loads what an earlier run made of the same. Alike on every rank.

    Counts: rows_read, rows_dropped_<reason>, pieces_dropped_zero_supervised, truncated and split (rows that were too
    long), empty_assistant_turns (where masked), rows_repeated and rows_left_out (by weights), of several sources
    source_<n>_rows_of_an_epoch (n from 1; a repeated row counts each time), documents, tokens and supervised_tokens
    (the targets) for training, validation_documents. Validation data's own other counts have the prefix validation_,
    and its rows are dropped from training; with a fraction, rows_read = train_rows + validation_rows + all dropped
    rows. Of a stream: what was read for the windows that training has begun with.
    One row, or many equal ones, cannot be split and is all training.

    Raises DataError as sources, formats and chat say, and when nothing is left to train on or to validate on.
    """
    encoder = Encoder(tokenizer, data=data)
    # Any id will do: padding is a document of its own, without loss.
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    train = [open_source(source, streaming=data.streaming) for source in data.sources]
    job = _Job(data, encoder, train, _opened_validation(data), pad_id, seed)
    opened = [*job.train, *([job.validation] if job.validation is not None else [])]
    identity = cache.fingerprint(
        data,
        identities=[[feed.identity for feed in feeds] for feeds in opened],
        tokenizer=tokenizer,
        seed=seed,
    )
    if data.streaming:
        return _streamed(job, identity)
    found = cache.load(identity)
    if found is not None:
        return _restored(found, identity)
    made = _make(job, identity)
    note = cache.save(_entry(made), identity)
    return replace(made, notes=(*made.notes, note)) if note else made


def _opened_validation(data: DataSection) -> list[Feed] | None:
    """The feeds of validation data of its own, if there is any."""
    own = Source(path=data.validation, format="auto") if isinstance(data.validation, str) else data.validation
    if not isinstance(own, Source):
        return None
    with _about_validation():
        return open_source(own, streaming=False)


@contextmanager
def _about_validation() -> Iterator[None]:
    """Errors say that it is the validation data they are about."""
    try:
        yield
    except DataError as error:
        error.args = (f"data.validation: {error}",)
        raise


_KEPT = ("counts", "train_rows", "validation_rows", "loss_on", "template", "notes")


def _entry(made: PreparedData) -> cache.Entry:
    meta = {name: getattr(made, name) for name in _KEPT}
    return cache.Entry(
        made.first_blocks, made.validation, {**meta, "example": asdict(made.example) if made.example else None}
    )


def _restored(found: cache.Entry, identity: str) -> PreparedData:
    meta = dict(found.meta)
    example = meta.pop("example")
    return PreparedData(
        found.train,
        found.validation,
        example=Example(**example) if example else None,
        identity=identity,
        notes=("data: read from the cache of an earlier run", *meta.pop("notes")),
        **meta,
    )


def _make(job: _Job, identity: str) -> PreparedData:
    counts: Counter[str] = Counter(truncated=0)
    own = _validating(job, counts)
    encoded = encode_sources(job.train, job.fitter(own), bad_rows=job.data.bad_rows, counts=counts)
    documents = encoded.flat()
    if own is None:
        held = held_out(encoded.digests, fraction=float(cast(float, job.data.validation)))
        train_rows, validation_rows = np.flatnonzero(~held), np.flatnonzero(held)
        validation_documents = encoded.documents_of(validation_rows)
    else:
        train_rows, validation_rows = np.arange(len(encoded.digests)), np.arange(len(own.digests))
        first = len(documents)
        documents = Documents.of([documents, own.flat()])
        validation_documents = np.arange(first, len(documents))
    epoch = _epoch(train_rows, encoded, job, counts)
    if len(job.train) > 1:
        of_sources = np.bincount(np.array(encoded.sources)[epoch], minlength=len(job.train))
        counts.update({f"source_{n}_rows_of_an_epoch": int(rows) for n, rows in enumerate(of_sources, 1)})
    placed = encoded.documents_of(epoch)
    train, validation = lay_out(
        documents, placed, validation_documents, data=job.data, pad_id=job.pad_id, seed=job.seed
    )
    counts.update(documents=len(placed), tokens=train.tokens, supervised_tokens=train.supervised_tokens)
    counts.update(validation_documents=len(validation_documents))
    return PreparedData(
        train=train,
        validation=validation,
        counts=dict(counts),
        example=_example(own or encoded, validation_rows, job),
        train_rows=len(train_rows),
        validation_rows=len(validation_rows),
        loss_on=dict(Counter(encoded.loss_on[row] for row in train_rows)),
        template=job.encoder.template,
        identity=identity,
        notes=_unheld(job.data, validation),
    )


def _unheld(data: DataSection, validation: Blocks | None) -> tuple[str, ...]:
    if validation is not None or data.validation == 0:
        return ()
    return (f"data.validation={data.validation} holds out nothing: the rows are all alike, or there is only one",)


def _streamed(job: _Job, identity: str) -> PreparedData:
    """The first window of the stream, and all of the validation data."""
    counts: Counter[str] = Counter()
    own = _validating(job, counts)
    validation = None
    rows = np.arange(len(own.digests) if own else 0)
    if own is not None:
        documents = own.flat()
        every = np.arange(len(documents))
        laid_out, _ = lay_out(documents, every, every[:0], data=job.data, pad_id=job.pad_id, seed=job.seed)
        validation = laid_out.bounded(job.data.max_length)  # as the stream's rows, of which nothing is known
    weights = [source.weight for source in job.data.sources if source.weight is not None]
    stream = Stream(
        sources=job.train,
        weights=weights or None,
        fitter=job.fitter(own),
        data=job.data,
        pad_id=job.pad_id,
        seed=job.seed,
        beside=counts,
        room_for=validation.max_documents if validation else 0,
    )
    return PreparedData(
        train=stream,
        validation=replace(validation, max_documents=stream.max_documents) if validation else None,
        counts=stream.counts,
        example=_example(own, rows, job) if own else None,
        train_rows=0,
        validation_rows=len(rows),
        loss_on=dict(stream.opening.loss_on),
        template=job.encoder.template,
        identity=identity,
        notes=_of_stream(stream),
    )


def _of_stream(stream: Stream) -> tuple[str, ...]:
    most = max(passes for passes, _ in stream.opening.behind)
    if not most:
        return ("data: streamed; the number of its rows is not known",)
    return (f"data: streamed; short of a window, so that the first one goes over it up to {most + 1} times",)


def _validating(job: _Job, counts: Counter[str]) -> Encoded | None:
    """The rows of validation data of its own, if there is any."""
    if job.validation is None:
        return None
    own: Counter[str] = Counter()
    with _about_validation():
        encoded = encode_sources([job.validation], job.fitter(None), bad_rows=job.data.bad_rows, counts=own)
    counts.update({f"validation_{reason}": n for reason, n in own.items()})
    return encoded


def _epoch(rows: Longs, encoded: Encoded, job: _Job, counts: Counter[str]) -> Longs:
    """The rows of one epoch: all of them once, or as the sources' weights say."""
    weights = [source.weight for source in job.data.sources]
    if weights[0] is None:
        return rows
    sources = np.array(encoded.sources)[rows]
    by_source = [rows[sources == index] for index in range(len(weights))]
    for source, found in zip(job.data.sources, by_source, strict=True):
        if not len(found):
            raise DataError(
                f"{source.path}: a source with a weight must have a row to train on; all of its rows validate.\n"
                f"Found: data.validation={job.data.validation}.\nLower it, or name validation data of its own."
            )
    chosen, repeated, left_out = weighted(by_source, [weight or 0.0 for weight in weights], seed=job.seed)
    counts.update(rows_repeated=repeated, rows_left_out=left_out)
    return chosen


def _example(encoded: Encoded, rows: Longs, job: _Job) -> Example | None:
    """The first of these rows that is a conversation with an answer and a prompt shorter than max_length. Read once
    more: keeping every row for the sake of one would cost memory."""
    sources = [job.validation] if job.validation is not None else job.train
    wanted = {(encoded.sources[row], encoded.ordinals[row]) for row in rows.tolist() if encoded.is_chat[row]}
    for index, feeds in enumerate(sources):
        again = chain.from_iterable(read_rows(feed, bad_rows="skip", counts=Counter()) for feed in feeds)
        last = max((ordinal for source, ordinal in wanted if source == index), default=-1)
        for ordinal, row in enumerate(islice(again, last + 1)):
            if (index, ordinal) in wanted and isinstance(row, Conversation):
                with suppress(RowFault):  # a template may refuse a conversation that ends with the question
                    if (found := _asked(row, job)) is not None:
                        return found
    return None


def _asked(row: Conversation, job: _Job) -> Example | None:
    turn = max((i for i, m in enumerate(row.messages) if m.role == "assistant"), default=0)
    if not turn or not row.messages[turn].content.strip():
        return None
    prompt, prompt_ids = job.encoder.prompt(row.messages[:turn])
    return Example(prompt_ids, prompt, row.messages[turn].content) if len(prompt_ids) < job.data.max_length else None
