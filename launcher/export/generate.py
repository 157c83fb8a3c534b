"""Answers of a trained model by stock `generate`, with a cache and the chat template saved with the adapter."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import GenerationConfig, TextStreamer

from launcher.checkpoint.files import append_text
from launcher.data.chat.left_out import has_tools
from launcher.data.chat.tool_calls import call_form, has_calls, in_call_form
from launcher.errors import DataError, RecipeError
from launcher.export.load_run import OpenedRun, generation_settings
from launcher.export.prompts import Chat, Prompt, read_chat
from launcher.recipe.run_options import GenerateOptions
from launcher.records.answers import Answer, Answered

Write = Callable[[str], object]  # takes pieces of a text as they come


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
    prompt = read_chat(chat, run.place.recipe.data, tools)
    text = _rendered(prompt, run.tokenizer) if prompt.tools and run.tokenizer.chat_template else ""
    if prompt.tools and not has_tools(list(prompt.tools), text):
        names = ", ".join(tool["function"]["name"] for tool in prompt.tools)
        raise RecipeError(
            f"the chat template must write the tools, or the model does not see them; it leaves out one of {names}.\n"
            "Ask without tools, or train with a tokenizer whose template has them."
        )
    return prompt


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
