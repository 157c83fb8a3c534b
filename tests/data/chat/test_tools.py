"""What the loss sees of chats with tools, thoughts and flags, by statements written by hand."""

import copy
import json
from typing import Any

import pytest

from launcher.data.example import find_examples
from launcher.data.read.rows import RowFault
from launcher.data.splits import digest
from launcher.export.prompts import prompt_of_row
from tests.support.chats import encode, encoder, supervised_runs
from tests.support.tool_templates import MESSAGES, TOOL_STYLES, calling, feed_of, result, row_of

CUT = "rows_cut_by_template"


@pytest.fixture(scope="session")
def make_tools(build_tokenizer):
    return lambda name: build_tokenizer(TOOL_STYLES[name].tokens, TOOL_STYLES[name].template)


SIZE: dict[str, Any] = {"max_length": 2048, "seed": 0}


@pytest.mark.parametrize("name", TOOL_STYLES)
def test_the_loss_sees_each_call_and_each_answer_up_to_its_end_and_no_result(make_tools, name):
    style, tokenizer = TOOL_STYLES[name], make_tools(name)
    [document] = encode(tokenizer, row_of(MESSAGES))
    assert supervised_runs(tokenizer, document) == style.learned
    assert document.remarks == ((CUT,) if name in ("deepseek", "gpt-oss") else ())  # they write no tools
    messages = [{**message, "weight": 0} if "tool_calls" in message else message for message in MESSAGES]
    [document] = encode(tokenizer, row_of(messages))
    assert supervised_runs(tokenizer, document) == style.learned[1::2]
    [document] = encode(tokenizer, row_of(MESSAGES), loss_on="last")
    assert supervised_runs(tokenizer, document) == style.learned[3:]


@pytest.mark.parametrize("name", TOOL_STYLES)
def test_a_chat_may_end_with_its_calls(make_tools, name):
    style, tokenizer = TOOL_STYLES[name], make_tools(name)
    [document] = encode(tokenizer, row_of(MESSAGES[:6]))
    blank = "<think>\n\n</think>\n\n" if name == "qwen 3" else ""  # where the chat ends
    assert supervised_runs(tokenizer, document) == [*style.learned[:2], blank + style.learned[2]]
    [document] = encode(tokenizer, row_of(MESSAGES[:2]), loss_on="last")
    assert supervised_runs(tokenizer, document) == [blank + style.learned[0]]


def call_of(arguments: Any, name: str = "f", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}], **more}


ARGUMENTS = {"a": {"b": [1, True, None, "x\ny"]}, "é": ""}


@pytest.mark.parametrize("arguments", [ARGUMENTS, {}, {"n": 2.5}, {"f": "f"}, '{"as": "text"}', None, "", {"q": '"}}'}])
def test_a_call_is_learned_whole_whatever_its_arguments_are(make_tools, arguments):
    tokenizer = make_tools("qwen 2.5")
    value = json.loads(arguments) if isinstance(arguments, str) and arguments else arguments or {}
    call = f'<tool_call>\n{{"name": "f", "arguments": {json.dumps(value, ensure_ascii=False)}}}\n</tool_call>'
    asked, told = {"role": "user", "content": "a"}, {"role": "tool", "content": "f"}
    for follows in ([], [told], [asked], [{"role": "assistant", "content": "b"}], [call_of({"z": 1}), told, asked]):
        row = row_of([asked, call_of(arguments), *follows, call_of(arguments, content="Wait. ")], None)
        [document] = encode(tokenizer, row)
        runs = supervised_runs(tokenizer, document)
        assert (runs[0], runs[-1]) == (f"{call}<|im_end|>", f"Wait. \n{call}<|im_end|>")
        assert len(runs) == sum(m["role"] == "assistant" for m in follows) + 2 and document.remarks == ()


def test_turns_that_follow_each_other_are_told_apart(make_tools):
    tokenizer = make_tools("llama 3.1")
    turns = [{"role": "assistant", "content": text} for text in ("one", " two ", "three")]
    [document] = encode(tokenizer, row_of([{"role": "user", "content": "a"}, *turns, result("Rome", 1), *turns]))
    assert supervised_runs(tokenizer, document) == ["one<|eot|>", "two<|eot|>", "three<|eot|>"] * 2
    turns[1]["train"] = False
    [document] = encode(tokenizer, row_of([{"role": "user", "content": "a"}, *turns]))
    assert supervised_runs(tokenizer, document) == ["one<|eot|>", "three<|eot|>"]


END = "<|im_end|>\n<|im_start|>"


def test_control_tokens_spelled_out_in_tools_calls_results_and_thoughts_stay_text(make_tools):
    tokenizer = make_tools("qwen 3")
    function = {"name": f"f{END}", "description": END, "parameters": {"properties": {END: {"type": "string"}}}}
    messages = [
        {"role": "user", "content": "a"},
        call_of({END: [END]}, f"f{END}"),
        {"role": "tool", "content": f"{END}assistant\nb"},
        {"role": "assistant", "content": "c", "reasoning_content": f"d{END}e"},
    ]
    [document] = encode(tokenizer, row_of(messages, [function]))
    starts, ends = (document.input_ids.tolist().count(tokenizer.convert_tokens_to_ids(t)) for t in END.split("\n"))
    assert starts == ends == 5  # of the template: tools, question, call, result, answer
    written = json.dumps(END)
    assert supervised_runs(tokenizer, document) == [
        f'<tool_call>\n{{"name": "f{END}", "arguments": {{{written}: [{written}]}}}}\n</tool_call><|im_end|>'.replace(
            "\\n", "\\n"
        ),
        f"<think>\nd{END}e\n</think>\n\nc<|im_end|>",
    ]
    assert document.remarks == ()


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_learned_where_the_template_writes_them_and_counted_where_not(make_tools, key):
    question, thought = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", key: "Hm.\nSo"}
    tokenizer = make_tools("qwen 3")
    [document] = encode(tokenizer, row_of([question, thought]))
    assert supervised_runs(tokenizer, document) == ["<think>\nHm.\nSo\n</think>\n\nb<|im_end|>"]
    assert document.remarks == ()
    [document] = encode(
        tokenizer, row_of([question, {**thought, key: "Now."}, question, thought])
    )  # left out before a question
    assert supervised_runs(tokenizer, document) == [
        "b<|im_end|>", "<think>\nHm.\nSo\n</think>\n\nb<|im_end|>",
    ]  # fmt: skip
    assert document.remarks == (CUT,)
    [document] = encode(make_tools("qwen 2.5"), row_of([question, thought]))
    assert document.remarks == (CUT,)
    oss = make_tools("gpt-oss")
    [document] = encode(oss, row_of([question, {**calling("Rome"), key: "Hm."}, result("Rome", 1), thought], None))
    assert supervised_runs(oss, document) == [
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=get_weather<|channel|>commentary<|message|>"
        '{"city": "Rome"}<|call|>',
        "<|channel|>analysis<|message|>Hm.\nSo<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>",
    ]
    assert document.remarks == ()


def test_ids_that_are_numbers_are_handed_on_as_text():
    """As data made by programs has them; none of them is left out, of a call or of its result."""
    call = {"id": 7, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    chat = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": 7, "content": "r"},
    ]
    row = row_of([MESSAGES[0], *chat])
    assert [row.messages[1].calls[0]["id"], row.messages[2].extra["tool_call_id"]] == ["7", "7"]
    for bad in (True, [7], {"a": 7}):
        with pytest.raises(RowFault, match="tool_call_id"):
            row_of([MESSAGES[0], chat[0], {**chat[1], "tool_call_id": bad}])
        with pytest.raises(RowFault, match='"tool_calls" is a list(.|\n)*the id'):
            row_of([MESSAGES[0], {**chat[0], "tool_calls": [{**call, "id": bad}]}, chat[1]])


def test_a_turn_of_thoughts_alone_is_learned(make_tools):
    tokenizer = make_tools("qwen 3")
    thought = {"role": "assistant", "content": None, "thinking": "Hm."}
    for follows in ([], [{"role": "assistant", "content": "b"}]):
        [document] = encode(tokenizer, row_of([{"role": "user", "content": "a"}, thought, *follows]))
        assert supervised_runs(tokenizer, document)[0] == "<think>\nHm.\n</think>\n\n<|im_end|>"


WITHOUT_CALLS = (
    TOOL_STYLES["llama 3.1"]
    .template.replace("m.tool_calls %}", "false %}")
    .replace("m.content | trim", "(m.content or 'calls') | trim")
)
NAMES_ALONE = TOOL_STYLES["llama 3.1"].template.replace("call.function.arguments | tojson", "'{}'")
MARKS_MISS = (
    "{%- for m in messages %}{{- '<|head|>' + m.role + '<|/head|>' }}{%- for call in m.tool_calls or [] %}"
    "{{- call.function | tojson }}{%- endfor %}{%- if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|eot|>' }}{% endgeneration %}{%- else %}{{- m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>' }}{%- endif %}"
)


@pytest.mark.parametrize("template", [WITHOUT_CALLS, NAMES_ALONE, MARKS_MISS])
@pytest.mark.parametrize("end", [2, 3])
def test_a_template_that_does_not_write_a_call_where_it_is_learned_is_refused(make_tools, template, end):
    tokenizer = make_tools("llama 3.1")
    tokenizer.chat_template = template
    with pytest.raises(RowFault, match=r"tool calls.*\n.*call of message 2|message 2, a call of tools"):
        encode(tokenizer, row_of(MESSAGES[:end]))
    answers = row_of([{**MESSAGES[0]}, {**calling("Paris"), "weight": 0}, MESSAGES[2], MESSAGES[3]])
    [document] = encode(tokenizer, answers)
    assert supervised_runs(tokenizer, document) == ["It is 21.<|eot|>"]
    tokenizer.chat_template = TOOL_STYLES["llama 3.1"].template


@pytest.mark.parametrize("end", ["{{ '<|eot|>' if loop.last else '<|/head|>' }}", "{{ ' the end' if loop.last }}"])
def test_a_template_that_does_not_show_where_a_call_ends_is_refused(make_tools, end):
    """Even where the call has no arguments, whose absence would show."""
    tokenizer = make_tools("llama 3.1")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|head|>' + m.role }}{% for call in m.tool_calls or [] %}"
        "{{ ' ' + call.function.name + ' <|head|> ' + (call.function.arguments | tojson) }}{% endfor %}"
        "{{ (m.content or '') }}"
        + end
        + "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant' }}{% endif %}"
    )
    for arguments in ({}, {"a": 1}):
        with pytest.raises(RowFault, match="message 2, a call of tools"):
            encode(tokenizer, row_of([MESSAGES[0], call_of(arguments), MESSAGES[2]], None))
    tokenizer.chat_template = TOOL_STYLES["llama 3.1"].template


def test_marks_of_a_template_with_calls_are_the_mask(make_tools):
    tokenizer = make_tools("llama 3.1")
    tokenizer.chat_template = MARKS_MISS.replace("{%- for call", "{% generation %}{%- for call").replace(
        "{%- endfor %}{%- if m.role == 'assistant'", "{%- endfor %}{% endgeneration %}{%- if m.role == 'assistant'"
    )
    [document] = encode(tokenizer, row_of(MESSAGES[:4]), unused="drop")
    call = '{"name": "get_weather", "arguments": {"city": "Paris"}}<|eot|>'
    assert supervised_runs(tokenizer, document) == [call, "It is 21.<|eot|>"]
    tokenizer.chat_template = TOOL_STYLES["llama 3.1"].template


def test_the_prompt_of_a_chat_with_tools_is_what_its_text_begins_with(make_tools):
    tokenizer, row = make_tools("qwen 2.5"), row_of(MESSAGES)
    [document] = encode(tokenizer, row)
    made = encoder(tokenizer)
    for turn in (1, 3, 5, 8):
        text, ids = made.prompt(row.messages[:turn], row.tools)
        assert ids == document.input_ids[: len(ids)].tolist() and '"description": "Tells the weather."' in text
        assert document.supervised[len(ids)] and not document.supervised[len(ids) - 1]


def test_a_role_that_the_template_refuses_is_named_and_one_that_it_leaves_out_is_counted(make_tools, make_tokenizer):
    chat = [{"role": "developer", "content": "Be brief."}, *MESSAGES[:1], MESSAGES[3]]
    [document] = encode(make_tools("llama 3.1"), row_of(chat, None))
    assert document.remarks == ()
    refuses = "{% if m.role == 'developer' %}{{ raise_exception('no such role') }}{% endif %}"
    template = TOOL_STYLES["llama 3.1"].template
    for part, remarks in ((refuses, None), ("{% if m.role != 'developer' %}", (CUT,))):
        tokenizer = make_tools("llama 3.1")
        begin = "{%- for m in messages %}"
        tokenizer.chat_template = template.replace(begin, begin + part)
        if remarks:
            tokenizer.chat_template = tokenizer.chat_template.replace(
                "{%- endfor %}{%- if add_g", "{% endif %}{%- endfor %}{%- if add_g"
            )
            assert encode(tokenizer, row_of(chat, None))[0].remarks == remarks
        else:
            with pytest.raises(RowFault, match=r"no such role\n.*developer can be written as system"):
                encode(tokenizer, row_of(chat, None))


def test_rows_with_tools_are_rendered_by_a_template_named_tool_use(make_tools):
    tokenizer = make_tools("qwen 2.5")
    plain = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
    tokenizer.chat_template = {"default": plain, "tool_use": TOOL_STYLES["qwen 2.5"].template}
    [document] = encode(tokenizer, row_of(MESSAGES))
    assert supervised_runs(tokenizer, document) == TOOL_STYLES["qwen 2.5"].learned
    [document] = encode(tokenizer, row_of(MESSAGES[:1], None), loss_on="all")
    assert tokenizer.decode(document.input_ids) == "<|im_start|>Paris?<|im_end|>"
    tokenizer.chat_template = TOOL_STYLES["qwen 2.5"].template


@pytest.mark.parametrize("name", ["qwen 2.5", "llama 3.1"])
def test_a_chat_of_twice_as_many_calls_is_rendered_with_twice_as_many_messages(make_tools, name, monkeypatch):
    tokenizer = make_tools(name)
    apply, rendered = tokenizer.apply_chat_template, []
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda m, **kw: rendered.append(len(m)) or apply(m, **kw))
    for turns in (50, 100):
        rendered.clear()
        loop = [turn for n in range(turns) for turn in (calling(f"City{n}"), result(f"City{n}", n))]
        [document] = encode(tokenizer, row_of([MESSAGES[0], *loop, MESSAGES[3]]))
        assert len(supervised_runs(tokenizer, document)) == turns + 1
        assert sum(rendered) < 6 * 2 * turns + 6 * turns + 40  # prompts, marks; two short chats a call


def test_an_example_of_a_run_asks_with_tools_and_expects_the_call(make_tools):
    tokenizer, row = make_tools("qwen 2.5"), row_of(MESSAGES[:2])
    [example] = find_examples([feed_of(MESSAGES[:2])], [digest(row, seed=0)], encoder=encoder(tokenizer), **SIZE)
    assert example.expected == '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    assert "Tells the weather." in example.prompt and example.prompt.endswith("assistant\n")


def test_an_example_of_a_run_expects_no_answer_that_is_taken_out_of_what_is_learned(make_tools):
    bad = {"role": "assistant", "content": "Nonsense.", "weight": 0}
    chat = [MESSAGES[0], {"role": "assistant", "content": "Sunny."}, MESSAGES[0], bad]
    made, row = encoder(make_tools("qwen 2.5")), row_of(chat)
    [example] = find_examples([feed_of(chat)], [digest(row, seed=0)], encoder=made, **SIZE)
    assert example.expected == "Sunny." and prompt_of_row(row).expected is None


def test_a_template_that_writes_tools_beside_a_system_text_alone_leaves_nothing_out(make_tools):
    tokenizer = copy.deepcopy(make_tools("qwen 2.5"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if m.role == 'system' and tools %}{{ tools | tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = [{"role": "system", "content": "Be brief."}, MESSAGES[0], {"role": "assistant", "content": "Sunny."}]
    [document] = encode(tokenizer, row_of(chat))
    assert CUT not in document.remarks
    [document] = encode(tokenizer, row_of(chat[1:]))
    assert CUT in document.remarks
