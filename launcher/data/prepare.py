"""One data section becomes packed training and validation rows, with a count for everything that was left out."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from launcher.data.chat import Encoder
from launcher.data.formats import Conversation, Row, read_source
from launcher.data.packing import Document, Packed, pack
from launcher.errors import DataError
from launcher.recipe.schema import DataSection, Source

Encoded = tuple[Row, Document]


@dataclass(frozen=True)
class Example:
    """A validation conversation up to its last assistant turn, rendered with generation prompt, and its answer."""

    prompt_ids: list[int]
    prompt: str
    expected: str


@dataclass(frozen=True)
class PreparedData:
    """`train_rows` and `validation_rows` count the rows of the sources that are in the packed ones."""

    train: Packed
    validation: Packed | None
    counts: dict[str, int]
    example: Example | None
    train_rows: int
    validation_rows: int


def prepare(data: DataSection, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreparedData:
    """Reads, renders, masks, splits and packs. The same on every rank; the seed decides the split and the packing.

    Counts: rows_read, rows_dropped_<reason>, truncated (rows that were cut), empty_assistant_turns (where masked),
    documents, tokens and supervised_tokens (the targets) for training, validation_documents. A validation file's other
    counts have the prefix validation_; with a fraction, rows_read = documents + validation_documents + all dropped.
    One row, or many equal ones, cannot be split and is all training.

    Raises DataError as formats and chat say, and when nothing is left to train on or to validate on.
    """
    encoder = Encoder(tokenizer, data=data)
    counts: Counter[str] = Counter(truncated=0)
    rows = _encoded(data.sources, encoder, data=data, counts=counts)
    if isinstance(data.validation, str):
        train = rows
        of_validation: Counter[str] = Counter()
        validation = _encoded([Source(path=data.validation, format="auto")], encoder, data=data, counts=of_validation)
        counts.update({f"validation_{reason}": n for reason, n in of_validation.items()})
    else:
        train, validation = split(rows, fraction=data.validation, seed=seed)
    packed, packed_validation = (_packed(part, tokenizer, data=data, seed=seed) for part in (train, validation))
    assert packed is not None  # _encoded leaves a row, and split leaves one for training
    if packed_validation is not None:
        # One shape of cu_seqlens for training and evaluation: a second one would be a second graph.
        most = max(packed.max_documents, packed_validation.max_documents)
        packed, packed_validation = (replace(p, max_documents=most) for p in (packed, packed_validation))
    counts.update(documents=len(train), tokens=packed.tokens, supervised_tokens=packed.supervised_tokens)
    counts.update(validation_documents=len(validation))
    example = _example(validation, encoder, max_length=data.max_length)
    return PreparedData(packed, packed_validation, dict(counts), example, len(train), len(validation))


def split(rows: Sequence[Encoded], *, fraction: float, seed: int) -> tuple[list[Encoded], list[Encoded]]:
    """Training and validation rows. Equal rows go to the same side; a row's side does not depend on the file's order.

    At least one row validates if two differ and fraction > 0; validation grows to round(fraction * rows), rarely beyond
    (when every group of equal rows is larger than that).
    """
    groups: dict[str, list[int]] = {}
    for index, (row, _) in enumerate(rows):
        groups.setdefault(_digest(row, seed), []).append(index)
    if fraction == 0 or len(groups) < 2:
        return list(rows), []
    wanted = min(round(fraction * len(rows)), len(rows) - 1)
    chosen: set[int] = set()
    for digest in sorted(groups):
        if len(chosen) + len(groups[digest]) <= wanted:
            chosen.update(groups[digest])
    if not chosen:
        chosen.update(groups[min(sorted(groups), key=lambda digest: len(groups[digest]))])
    return (
        [row for index, row in enumerate(rows) if index not in chosen],
        [row for index, row in enumerate(rows) if index in chosen],
    )


def _digest(row: Row, seed: int) -> str:
    content = [[m.role, m.content] for m in row.messages] if isinstance(row, Conversation) else row.text
    return hashlib.sha256(json.dumps([seed, content]).encode()).hexdigest()


def _encoded(sources: Sequence[Source], encoder: Encoder, *, data: DataSection, counts: Counter[str]) -> list[Encoded]:
    """The usable rows of the sources, each with its document of at most max_length tokens. Never empty."""
    rows = [row for source in sources for row in read_source(source, bad_rows=data.bad_rows, counts=counts)]
    if data.loss_on != "all":
        counts["empty_assistant_turns"] += sum(_empty_turns(row) for row in rows)
    kept = []
    for row, document in encoder.encode(rows, counts=counts):
        fitted = _fitted(row, document, data=data, counts=counts)
        if fitted and not any(fitted.supervised[1:]):  # nothing predicts a document's first token
            counts["rows_dropped_zero_supervised"] += 1
        elif fitted:
            kept.append((row, fitted))
    if not kept:
        dropped = ", ".join(f"{n} {reason}" for reason, n in counts.items() if "dropped" in reason)
        raise DataError(
            f"{', '.join(s.path for s in sources)}: 0 usable rows; at least one must hold a token to learn.\n"
            f"Found: {counts['rows_read']} rows read; {dropped}.\n"
            "Give rows with an answer, raise data.max_length, or set data.loss_on=all."
        )
    return kept


def _empty_turns(row: Row) -> int:
    messages = row.messages if isinstance(row, Conversation) else ()
    return sum(m.role == "assistant" and not m.content.strip() for m in messages)


def _fitted(row: Row, document: Document, *, data: DataSection, counts: Counter[str]) -> Document | None:
    length = len(document.input_ids)
    if length <= data.max_length:
        return document
    if data.too_long == "raise":
        raise DataError(
            f"{row.where}: with data.too_long=raise a row holds at most data.max_length={data.max_length} tokens.\n"
            f"Found: {length} tokens.\nRaise data.max_length, or set data.too_long=truncate or data.too_long=drop."
        )
    if data.too_long == "drop":
        counts["rows_dropped_too_long"] += 1
        return None
    counts["truncated"] += 1
    return Document(document.input_ids[: data.max_length], document.supervised[: data.max_length])


def _packed(
    rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, *, data: DataSection, seed: int
) -> Packed | None:
    if not rows:
        return None
    # Any id will do: padding is a document of its own, without loss.
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    return pack([document for _, document in rows], max_length=data.max_length, pad_id=pad_id, seed=seed)


def _example(rows: Sequence[Encoded], encoder: Encoder, *, max_length: int) -> Example | None:
    """The first conversation, in the order of the sources, with an answer and a prompt shorter than max_length."""
    for row, _ in rows:
        if not isinstance(row, Conversation):
            continue
        last = max((i for i, m in enumerate(row.messages) if m.role == "assistant"), default=0)
        if last and row.messages[last].content.strip():
            prompt, prompt_ids = encoder.prompt(row.messages[:last])
            if len(prompt_ids) < max_length:
                return Example(prompt_ids, prompt, row.messages[last].content)
    return None
