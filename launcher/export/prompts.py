"""What is to be answered, read from a file. Imports no torch: a wrong file is answered at once."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from launcher.data.read.formats import RENAME, read_rows
from launcher.data.read.messages import for_template
from launcher.data.read.rows import SKIP, Conversation, Feed, RawRow, Row, RowFault, TokenIds
from launcher.data.read.sources import open_source
from launcher.data.read.unused import UNUSED_REMEDY
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection, Source
from launcher.records.counts import counts_in_words

Chat = list[dict[str, Any]]  # messages as chat templates take them
CORRECT = "Correct the row, or take it out of the file."
GIVE = 'Give rows as {"prompt": "..."} or {"messages": [...]}.'
CALLER = "the prompt"  # where a caller's chat stands, in errors
COMPLETED = {"completion", "messages", "conversations", "instruction", "text"}  # columns of no bare prompt


class Prompt(NamedTuple):
    """What is to be answered: a chat, or the beginning of a text."""

    content: Chat | str | list[int]  # token ids: rendered already
    expected: str | None = None  # the data's own answer
    tools: tuple[dict[str, Any], ...] = ()  # of a chat, as Conversation has them


def read_prompts(file: Path, data: DataSection) -> tuple[list[Prompt | str], str]:
    """Every row of a file without the answer that it ends with, a bare prompt as its text; and what was dropped, in
    words. `data`: the section of the run's recipe.

    Raises DataError as the data of a run does, and where a row has nothing that can be answered.
    """
    data = data.model_copy(update={"sources": [Source(path=str(file))], "streaming": False})
    counts = Counter[str]()
    bare, feeds = set[str](), open_source(data.sources[0], data=data).feeds
    feeds = [replace(feed, raw_rows=partial(_bare_as_chats, feed, bare)) for feed in feeds]
    try:
        rows = list(read_rows(feeds, data=data, counts=counts))
    except RowFault as fault:
        raise _of_prompts(fault, bare) from None
    dropped = {key: count for key, count in counts.items() if key.startswith("rows_dropped") and count}
    if not rows:
        raise DataError(f"{file}: prompts must hold a row to answer; it has {counts_in_words(counts) or 'none'}.")
    prompts = [
        row.messages[0].content
        if isinstance(row, Conversation) and row.where in bare and len(row.messages) == 1 and not row.tools
        else prompt_of_row(row)
        for row in rows
    ]
    return prompts, counts_in_words(dropped)


def read_chat(chat: str | Chat, data: DataSection, tools: Sequence[dict[str, Any]] | None = None) -> Prompt:
    """A caller's message or chat, read as a row of data is. `tools`: as in its column. Raises DataError."""
    fields = {"messages": [{"role": "user", "content": chat}] if isinstance(chat, str) else chat, "tools": tools}
    feed = Feed(CALLER, CALLER, "messages", "", lambda: iter([RawRow(CALLER, fields)]))
    data = data.model_copy(update={"bad_rows": "raise"})  # of one chat none may be skipped
    try:
        rows = list(read_rows([feed], data=data, counts=Counter()))
    except RowFault as fault:
        raise DataError(str(_of_prompts(fault, set())).replace(CORRECT, "Correct it.")) from None
    if not rows:
        raise DataError(f"{CALLER}: a chat must hold a message; it has none.")
    [row] = rows
    assert isinstance(row, Conversation), "of the format messages"
    return Prompt(list(map(for_template, row.messages)), tools=row.tools)


def _of_prompts(fault: RowFault, bare: set[str]) -> DataError:
    """A row's fault in the words of its file: of a row with a prompt alone, which is read as messages, `prompt`. The
    recipe's keys are no remedy here."""
    text = str(fault).replace(SKIP, CORRECT)
    text = text.replace(RENAME, GIVE).replace(UNUSED_REMEDY, "Remove it.")
    is_bare = any(text.startswith(f"{where}: ") for where in bare)
    return DataError(re.sub(r"\bmessages\b", "prompt", text) if is_bare else text)


def _bare_as_chats(feed: Feed, bare: set[str]) -> Iterator[RawRow | RowFault]:
    """The rows of a feed, a prompt without completion as messages; `bare`: where such rows stand. No format of training
    data has them: there is nothing to learn."""
    for raw in feed.raw_rows():
        prompt = raw.fields.get("prompt") if isinstance(raw, RawRow) else None
        if isinstance(raw, RawRow) and isinstance(prompt, str | list) and raw.fields.keys().isdisjoint(COMPLETED):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            fields = {key: value for key, value in raw.fields.items() if key != "prompt"}
            raw = raw._replace(fields={**fields, "messages": messages})
            bare.add(raw.where)
        yield raw


def prompt_of_row(row: Row) -> Prompt:
    """The whole chat, or what stands before the answer that it ends with. Raises DataError for a text without one."""
    if not isinstance(row, Conversation):
        if isinstance(row, TokenIds) or not row.answer:
            found = "token ids" if isinstance(row, TokenIds) else "plain text"
            raise DataError(f"{row.where}: a prompt is a chat, or a text with a prompt.\nFound: {found}.\n{GIVE}")
        return Prompt(row.text[: row.answer], row.text[row.answer :])
    messages, last = list(map(for_template, row.messages)), row.messages[-1]
    if len(messages) > 1 and last.role == "assistant":
        return Prompt(messages[:-1], None if last.train is False else last.said, row.tools)
    return Prompt(messages, tools=row.tools)
