"""The questions that a run answers, so that one can read what the model has learned."""

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from launcher.data.chat.encode import Encoder
from launcher.data.read.formats import read_rows
from launcher.data.read.rows import Conversation, Feed, RowFault
from launcher.data.splits import digest

EXAMPLES = 8  # as many as run.eval_samples may ask for


@dataclass(frozen=True)
class Example:
    """A validation chat up to the last turn that is learned, rendered with generation prompt, and its answer."""

    prompt_ids: list[int]
    prompt: str
    expected: str


def find_examples(
    feeds: Iterable[Feed], digests: Iterable[bytes], *, encoder: Encoder, max_length: int, seed: int
) -> tuple[Example, ...]:
    """The first conversations with one of these digests that end in an answer and have a prompt shorter than
    max_length, at most EXAMPLES.

    Reads the feeds again, up to those rows: keeping every row for the sake of a few would cost memory.
    """
    left, found = set(digests), list[Example]()
    rows = read_rows(feeds, data=encoder.data.model_copy(update={"bad_rows": "skip"}), counts=Counter())
    while left and len(found) < EXAMPLES and (row := next(rows, None)) is not None:
        row_digest = digest(row, seed=seed)
        if row_digest in left and isinstance(row, Conversation):
            left.remove(row_digest)
            with suppress(RowFault):  # a template may refuse a conversation that ends with the question
                example = _example_of(row, encoder)
                if example is not None and len(example.prompt_ids) < max_length:
                    found.append(example)
    return tuple(found)


def _example_of(row: Conversation, encoder: Encoder) -> Example | None:
    learned = [i for i, m in enumerate(row.messages) if m.role == "assistant" and m.train is not False]
    turn = max(learned, default=0)
    if not turn or not row.messages[turn].said.strip():
        return None
    prompt, prompt_ids = encoder.prompt(row.messages[:turn], row.tools)
    return Example(prompt_ids, prompt, row.messages[turn].said)
