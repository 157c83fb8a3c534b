"""Chats with tools are asked as they are trained on."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from launcher.data.chat.encode import Encoder
from launcher.data.read.rows import Conversation
from launcher.errors import DataError, RecipeError
from launcher.export.generate import Answerer, prompt_of_chat
from launcher.export.prompts import Prompt, prompt_of_row, read_prompts
from launcher.recipe.data_section import DataSection
from launcher.recipe.run_options import GenerateOptions
from tests.support.reading import read, written
from tests.support.tool_templates import MESSAGES, TOOL_STYLES, TOOLS

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "base"


class Silent:
    """A model that keeps what it is asked and answers with an end token."""

    device, asked = torch.device("cpu"), torch.empty(0)

    def generate(self, *, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        self.asked = input_ids
        return torch.cat([input_ids, torch.zeros(1, 1, dtype=torch.long)], dim=1)


def run_with(name: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens(TOOL_STYLES[name].tokens)
    tokenizer.chat_template = TOOL_STYLES[name].template
    data = DataSection.model_validate({"sources": [{"path": "rows.jsonl"}]})
    place = SimpleNamespace(recipe=SimpleNamespace(data=data))
    config = SimpleNamespace(max_position_embeddings=4096)
    return SimpleNamespace(tokenizer=tokenizer, stop_ids=[0], config=config, place=place)


@pytest.mark.parametrize("name", TOOL_STYLES)
@pytest.mark.parametrize("end", [1, 3, 8])
def test_the_model_is_asked_for_a_turn_as_it_was_trained_on_it(tmp_path: Path, name: str, end: int) -> None:
    run, model = run_with(name), Silent()
    file = written(tmp_path / "rows.jsonl", [{"messages": MESSAGES[: end + 1], "tools": TOOLS}])
    [row], _ = read(file)
    assert isinstance(row, Conversation)
    prompt = prompt_of_row(row)
    Answerer(
        run,
        model,
        GenerateOptions(run="."),
    ).answered(prompt)  # type: ignore[arg-type]
    encoder = Encoder(run.tokenizer, data=run.place.recipe.data)
    assert model.asked[0].tolist() == encoder.prompt(row.messages[:-1], row.tools)[1]
    expected = '{"name": "get_weather", "arguments": {"city": "Paris"}}' if end == 1 else MESSAGES[end]["content"]
    assert prompt.expected == expected


def test_a_bare_prompt_keeps_its_tools(tmp_path: Path) -> None:
    file = written(tmp_path / "prompts.jsonl", [{"prompt": "Rome?", "tools": json.dumps(TOOLS)}])
    [prompt], _ = read_prompts(file, run_with("qwen 2.5").place.recipe.data)
    assert (
        isinstance(prompt, Prompt)
        and prompt.tools == tuple(TOOLS)
        and prompt.content == [{"role": "user", "content": "Rome?"}]
    )


def test_a_callers_chat_is_asked_as_the_same_row_of_a_file_is(tmp_path: Path) -> None:
    """Arguments as OpenAI has them, a string of JSON; content null; tools without their wrapping."""
    run, asked = run_with("qwen 2.5"), []
    call = MESSAGES[1]["tool_calls"][0]
    arguments = json.dumps(call["function"]["arguments"])
    written_out = {**call, "function": {**call["function"], "arguments": arguments}}
    chat = [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [written_out]}, MESSAGES[2]]
    [of_file], _ = read_prompts(
        written(tmp_path / "rows.jsonl", [{"messages": chat, "tools": TOOLS}]), run.place.recipe.data
    )
    for prompt in (of_file, prompt_of_chat(chat, run, [tool["function"] for tool in TOOLS])):
        model = Silent()
        Answerer(run, model, GenerateOptions(run=".")).answered(prompt)  # type: ignore[arg-type]
        asked.append(model.asked[0].tolist())
    assert asked[0] == asked[1] and "Tells the weather." in run.tokenizer.decode(asked[1])


@pytest.mark.parametrize(
    ("chat", "tools", "why"),
    [
        ([{"role": "user", "content": 3}], None, r"string.*\n.*3"),
        ([{"role": "robot", "content": "a"}], None, "a role is one of"),
        ([{"role": "user", "content": "a", "reasoningContent": "b"}], None, "reasoningContent"),
        ([], None, "must hold a message"),
        ([{"role": "user", "content": "a"}], [{"type": "function"}], '"tools" is a list'),
    ],
)
def test_a_callers_chat_that_is_none_is_refused_in_its_own_words(chat: Any, tools: Any, why: str) -> None:
    run = run_with("qwen 2.5")
    run.place.recipe.data = run.place.recipe.data.model_copy(update={"bad_rows": "skip"})  # of the run's own data
    with pytest.raises(DataError, match=why) as caught:
        prompt_of_chat(chat, run, tools)
    said = str(caught.value)
    assert said.startswith("the prompt: ") and "data." not in said and "file" not in said


def test_tools_that_would_be_left_out_are_refused() -> None:
    run, asked = run_with("qwen 2.5"), [{"role": "user", "content": "Rome?"}]
    assert prompt_of_chat("Rome?", run, TOOLS) == prompt_of_chat(asked, run, TOOLS)
    for template in ("{% for m in messages %}{{ m.content }}{% endfor %}", None):
        run.tokenizer.chat_template = template
        with pytest.raises(RecipeError, match="chat template must write the tools.*get_weather"):
            prompt_of_chat("Rome?", run, TOOLS)
    assert prompt_of_chat("Rome?", run).content == "Rome?"


def test_thoughts_are_asked_with_under_the_name_that_the_template_reads(tmp_path: Path) -> None:
    thought = {"role": "assistant", "content": "a", "thinking": "Hm."}
    chat = [{"role": "user", "content": "Hi"}, thought, {"role": "user", "content": "?"}, {**thought, "content": "b"}]
    [row], _ = read(written(tmp_path / "rows.jsonl", [{"messages": chat}]))
    prompt = prompt_of_row(row).content
    assert [prompt[1][key] for key in ("reasoning_content", "thinking", "reasoning")] == ["Hm."] * 3  # type: ignore
