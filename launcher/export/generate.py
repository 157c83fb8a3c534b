"""Answers of a trained model by stock `generate`, with a cache and the chat template saved with the adapter."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from transformers import GenerationConfig, TextStreamer

from launcher.checkpoint.files import append_text
from launcher.data.chat.left_out import has_tools
from launcher.data.chat.tool_calls import call_form, has_calls, in_call_form
from launcher.data.read.formats import read_rows
from launcher.data.read.messages import for_template
from launcher.data.read.rows import SKIP, Conversation, Feed, RawRow, Row, RowFault, TokenIds
from launcher.data.read.sources import open_source
from launcher.data.read.unused import UNUSED_REMEDY
from launcher.errors import DataError, RecipeError
from launcher.export.load_run import OpenedRun, generation_settings
from launcher.recipe.data_section import Source
from launcher.recipe.run_options import GenerateOptions
from launcher.records.answers import Answer, Answered
from launcher.records.counts import counts_in_words

Chat = list[dict[str, Any]]  # messages as chat templates take them
CALLER = "the prompt"  # where a caller's chat stands, in errors
COMPLETED = {"completion", "messages", "conversations", "instruction", "text"}  # columns of no bare prompt
Write = Callable[[str], object]  # takes pieces of a text as they come


class Prompt(NamedTuple):
    """What is to be answered: a chat, or the beginning of a text."""

    content: Chat | str | list[int]  # token ids: rendered already
    expected: str | None = None  # the data's own answer
    tools: tuple[dict[str, Any], ...] = ()  # of a chat, as Conversation has them


class _Stream(TextStreamer):
    """Hands the text on instead of printing it."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


class Answerer:
    """Answers prompts with a loaded model as the options say."""

    def __init__(self, run: OpenedRun, model: PeftModel, options: GenerateOptions) -> None:
        self._run, self._options = run, options
        self._model = cast(Any, model)
        # The base's own settings, such as a temperature, would be added to what is asked for.
        self._model.generation_config = generation_settings(run.stop_ids)

    def answered(self, prompt: Prompt) -> Answered:
        """The answer, and with base=true the base's."""
        base = self.answer(prompt.content, base=True, tools=prompt.tools) if self._options.base else None
        answer = self.answer(prompt.content, tools=prompt.tools)
        return Answered(self._shown(prompt.content), answer, base, prompt.expected)

    def answered_or_not(self, prompt: Prompt) -> Answered | DataError | RecipeError:
        """As `answered`, or what `answer` raises: one prompt must not cost what the others gave."""
        try:
            return self.answered(prompt)
        except (DataError, RecipeError) as error:
            return error

    @torch.inference_mode()
    def answer(
        self,
        content: Chat | str | list[int],
        *,
        base: bool = False,
        write: Write | None = None,
        tools: tuple[dict[str, Any], ...] = (),
    ) -> Answer:
        """One answer; `base`: with the adapter off. `write` gets its text as it grows.

        Raises DataError where the chat template refuses the chat, RecipeError for a prompt longer than the model's
        positions.
        """
        ids = self._ids(content, tools)
        room = self._run.config.max_position_embeddings - ids.shape[1]
        if room < 1:
            raise RecipeError(
                f"a prompt must leave room for an answer; this one has {ids.shape[1]:,} tokens, and the model "
                f"{self._run.config.max_position_embeddings:,} positions.\nShorten it, or begin a new chat."
            )
        torch.manual_seed(self._options.seed)
        streamer = _Stream(self._run.tokenizer, write) if write else None
        started_s = time.perf_counter()
        with self._model.disable_adapter() if base else nullcontext():
            output: Any = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._settings(room),
                streamer=streamer,
            )
        found = output[0, ids.shape[1] :].tolist()
        text = self._run.tokenizer.decode(found, skip_special_tokens=True).strip()
        return Answer(text, len(found), time.perf_counter() - started_s, found[-1] in self._run.stop_ids)

    def _settings(self, room: int) -> GenerationConfig:
        options = self._options
        sampling: dict[str, Any] = {"do_sample": False}
        if options.temperature > 0:  # top_k: transformers would keep the 50 likeliest tokens unasked
            sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        return generation_settings(self._run.stop_ids, max_new_tokens=min(options.max_tokens, room), **sampling)

    def _shown(self, content: Chat | str | list[int]) -> str:
        """The last message of a chat; else the whole text."""
        if isinstance(content, str):
            return content
        if isinstance(last := content[-1], dict):
            return str(last["content"])
        return str(self._run.tokenizer.decode(content, skip_special_tokens=True)).strip()

    def _ids(self, content: Chat | str | list[int], tools: tuple[dict[str, Any], ...]) -> torch.Tensor:
        """int64 [1, L], on the model's device."""
        tokenizer: Any = self._run.tokenizer
        if not isinstance(content, str) and isinstance(content[0], int):
            ids: Any = content
        elif isinstance(content, str):
            ids = tokenizer(content, add_special_tokens=False)["input_ids"]
            bos = tokenizer.bos_token_id
            ids = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
        else:
            text = _rendered(Prompt(content, tools=tools), tokenizer)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([ids], device=self._model.device)


def _rendered(prompt: Prompt, tokenizer: Any) -> str:
    """A chat and the generation prompt. Raises DataError where the chat template refuses it."""
    messages: Any = prompt.content
    if has_calls(messages):
        messages = in_call_form(messages, call_form(partial(tokenizer.apply_chat_template, tokenize=False)))
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tools=list(prompt.tools) or None, add_generation_prompt=True, tokenize=False
            )
        )
    except Exception as error:  # templates refuse in their own words
        raise DataError(
            f"the chat template must take the conversation; it refuses one of "
            f"{' '.join(message['role'] for message in messages)}: {error}."
        ) from None


def prompt_of(text: str, run: OpenedRun) -> Prompt:
    """A message of the user; for a tokenizer without chat template the beginning of a text."""
    return Prompt([{"role": "user", "content": text}] if run.tokenizer.chat_template else text)


def prompt_of_chat(chat: str | Chat, run: OpenedRun, tools: Sequence[dict[str, Any]] | None = None) -> Prompt:
    """What a caller asks, a message of the user or a chat, read as a row of data is. `tools`: as in its column.

    Raises DataError where it is no chat, RecipeError where the chat template leaves the tools out.
    """
    if isinstance(chat, str) and not tools:
        return prompt_of(chat, run)
    fields = {"messages": [{"role": "user", "content": chat}] if isinstance(chat, str) else chat, "tools": tools}
    feed = Feed(CALLER, CALLER, "messages", "", lambda: iter([RawRow(CALLER, fields)]))
    try:
        rows = list(read_rows([feed], data=run.place.recipe.data, counts=Counter()))
    except RowFault as fault:
        raise _of_prompts(fault, set()) from None
    if not rows:
        raise DataError(f"{CALLER}: a chat must hold a message; it has none.")
    [row] = rows
    assert isinstance(row, Conversation), "of the format messages"
    prompt = Prompt(list(map(for_template, row.messages)), tools=row.tools)
    if row.tools and not (run.tokenizer.chat_template and has_tools(list(row.tools), _rendered(prompt, run.tokenizer))):
        names = ", ".join(tool["function"]["name"] for tool in row.tools)
        raise RecipeError(
            f"the chat template must write the tools, or the model does not see them; it leaves out one of {names}.\n"
            "Ask without tools, or train with a tokenizer whose template has them."
        )
    return prompt


def read_prompts(file: Path, run: OpenedRun) -> tuple[list[Prompt], str]:
    """Every row of a file without the answer that it ends with, and what was dropped, in words.

    Raises DataError as the data of a run does, and where a row has nothing that can be answered.
    """
    data = run.place.recipe.data.model_copy(update={"sources": [Source(path=str(file))], "streaming": False})
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
        prompt_of(row.messages[0].content, run)
        if isinstance(row, Conversation) and row.where in bare and len(row.messages) == 1 and not row.tools
        else prompt_of_row(row)
        for row in rows
    ]
    return prompts, counts_in_words(dropped)


def _of_prompts(fault: RowFault, bare: set[str]) -> DataError:
    """A row's fault in the words of its file: of a row with a prompt alone, which is read as messages, `prompt`. The
    recipe's keys are no remedy here."""
    text = str(fault).replace(SKIP, "Correct the row, or take it out of the file.").replace(UNUSED_REMEDY, "Remove it.")
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
            raise DataError(
                f"{row.where}: a prompt is a chat, or a text with a prompt.\nFound: {found}.\n"
                'Give rows as {"prompt": "..."} or {"messages": [...]}.'
            )
        return Prompt(row.text[: row.answer], row.text[row.answer :])
    messages, last = list(map(for_template, row.messages)), row.messages[-1]
    if len(messages) > 1 and last.role == "assistant":
        return Prompt(messages[:-1], None if last.train is False else last.said, row.tools)
    return Prompt(messages, tools=row.tools)


def answer_all(answerer: Answerer, prompts: list[Prompt], file: Path) -> Iterator[Answered | DataError | RecipeError]:
    """Answer each prompt; each answer, or why there is none, is a line of `file`, a new one, as soon as it is there."""
    for prompt in prompts:
        found = answerer.answered_or_not(prompt)
        said = asdict(found) if isinstance(found, Answered) else {"expected": prompt.expected, "error": str(found)}
        append_text(
            file,
            json.dumps(
                {**said, "prompt": prompt.content, **({"tools": prompt.tools} if prompt.tools else {})},
                ensure_ascii=False,
            )
            + "\n",
        )
        yield found
