"""Chat templates with tools in the forms of well-known models, and by hand what a model must write of one chat.

The chat: a question, a call, its result, an answer; a second question, two calls at once, their results, an answer.
"""

from collections import Counter
from typing import Any, NamedTuple

from launcher.data.read.formats import read_rows
from launcher.data.read.rows import Conversation, Feed, RawRow
from launcher.recipe.data_section import DataSection

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def calling(*cities: str, **more: Any) -> dict[str, Any]:
    """A turn that asks for the weather of cities."""
    calls = [
        {"id": f"call{city:_<5}", "type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
        for city in cities
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls, **more}


def result(city: str, celsius: int) -> dict[str, Any]:
    content = f'{{"celsius": {celsius}}}'
    return {"role": "tool", "tool_call_id": f"call{city:_<5}", "name": "get_weather", "content": content}


MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Paris?"},
    calling("Paris"),
    result("Paris", 21),
    {"role": "assistant", "content": "It is 21."},
    {"role": "user", "content": "Rome and Oslo?"},
    calling("Rome", "Oslo"),
    result("Rome", 30),
    result("Oslo", 9),
    {"role": "assistant", "content": "Rome has 30, Oslo 9."},
]


def feed_of(messages: list[Any], tools: Any = TOOLS, **columns: Any) -> Feed:
    fields = {"messages": messages, "tools": tools, **columns}
    return Feed("rows.jsonl", "rows.jsonl", "messages", "", lambda: iter([RawRow("rows.jsonl:1", fields)]))


def row_of(messages: list[Any], tools: Any = TOOLS, **columns: Any) -> Conversation:
    """The row of these messages, as it is read."""
    data = DataSection.model_validate({"sources": [{"path": "rows.jsonl"}]})
    [row] = read_rows([feed_of(messages, tools, **columns)], data=data, counts=Counter())
    assert isinstance(row, Conversation)
    return row


class ToolStyle(NamedTuple):
    template: str
    tokens: dict[str, Any]
    learned: list[str]  # of MESSAGES, turn by turn


LAST_QUESTION = (
    "{%- set ns = namespace(question=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.question = loop.index0 %}{%- endif %}{%- endfor %}"
)


def _hermes(thoughts: str) -> str:
    """Results stand in a turn of the user's, several in one; `thoughts`: what of them is written of the message m."""
    return (
        "{%- if tools %}{{- '<|im_start|>system\n<tools>' }}{%- for tool in tools %}{{- '\n' + (tool | tojson) }}"
        "{%- endfor %}{{- '\n</tools><|im_end|>\n' }}{%- endif %}" + LAST_QUESTION + ""
        "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}" + thoughts + ""
        "{%- if m.content %}{{- m.content }}{%- endif %}{%- for call in m.tool_calls or [] %}"
        "{%- if not loop.first or m.content %}{{- '\n' }}{%- endif %}"
        '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
        "{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}"
        "{%- elif m.role == 'tool' %}{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
        "{{- '<|im_start|>user' }}{%- endif %}{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
        "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
        "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    )


HERMES_CALL = '<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'.format
CHATML_TOKENS = {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]}
HERMES = [
    f"{HERMES_CALL('Paris')}<|im_end|>",
    "It is 21.<|im_end|>",
    f"{HERMES_CALL('Rome')}\n{HERMES_CALL('Oslo')}<|im_end|>",
    "Rome has 30, Oslo 9.<|im_end|>",
]
TOOL_STYLES = {
    "qwen 2.5": ToolStyle(_hermes(""), CHATML_TOKENS, HERMES),
    "qwen 3": ToolStyle(  # thoughts behind the last question, and an empty block in the turn that ends the chat
        _hermes(
            "{%- if loop.index0 > ns.question and (loop.last or m.reasoning_content) %}"
            "{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{%- endif %}"
        ),
        CHATML_TOKENS,
        [*HERMES[:3], f"<think>\n\n</think>\n\n{HERMES[3]}"],
    ),
    "llama 3.1": ToolStyle(  # one call a turn as JSON, no content beside it; results with a header of their own
        "{{- '<|begin|>' }}{%- if tools %}{{- '<|head|>system<|/head|>\n\n' + (tools | tojson) }}"
        "{{- '<|eot|>' }}{%- endif %}"
        "{%- for m in messages %}{%- if m.role == 'tool' %}"
        "{{- '<|head|>ipython<|/head|>\n\n' + (m.content | tojson) + '<|eot|>' }}"
        "{%- elif m.tool_calls %}{{- '<|head|>assistant<|/head|>\n\n' }}{%- for call in m.tool_calls %}"
        '{{- \'{"name": "\' + call.function.name + \'", "parameters": \' }}{{- call.function.arguments | tojson }}'
        "{{- '}' }}{%- endfor %}{{- '<|eot|>' }}"
        "{%- else %}{{- '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}{%- endif %}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\n\n' }}{%- endif %}",
        {"bos_token": "<|begin|>", "eos_token": "<|eot|>", "extra_special_tokens": ["<|head|>", "<|/head|>"]},
        [
            '{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot|>',
            "It is 21.<|eot|>",
            '{"name": "get_weather", "parameters": {"city": "Rome"}}{"name": "get_weather", "parameters": '
            '{"city": "Oslo"}}<|eot|>',
            "Rome has 30, Oslo 9.<|eot|>",
        ],
    ),
    "mistral": ToolStyle(  # tools before the last question, wherever that is; calls are a list with their ids
        "{{- bos_token }}" + LAST_QUESTION + "{%- for m in messages %}{%- if m.role == 'user' %}"
        "{%- if tools and loop.index0 == ns.question %}"
        "{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
        "{{- '[INST] ' + m.content + '[/INST]' }}"
        "{%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}"
        "{%- if call.id | length != 9 %}{{- raise_exception('an id has 9 characters') }}{%- endif %}"
        "{{- (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' }}"
        "{{- ', ' if not loop.last else ']</s>' }}"
        "{%- endfor %}{%- elif m.role == 'tool' %}"
        "{{- '[TOOL_RESULTS] {\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id }}"
        "{{- '\"}[/TOOL_RESULTS]' }}"
        "{%- else %}{{- ' ' + m.content | trim + '</s>' }}{%- endif %}{%- endfor %}",
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "extra_special_tokens": [
                "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
                "[/TOOL_RESULTS]",
            ],
        },
        [
            '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "callParis"}]</s>',
            " It is 21.</s>",
            '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Rome"}, "id": "callRome_"}, '
            '{"name": "get_weather", "arguments": {"city": "Oslo"}, "id": "callOslo_"}]</s>',
            " Rome has 30, Oslo 9.</s>",
        ],
    ),
    "deepseek": ToolStyle(  # calls only where there is no content, arguments as text; a question has no end token
        "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' and m.content is not defined %}"
        "{{- '<|Assistant|><|calls|>' }}{%- for call in m.tool_calls %}"
        "{{- '<|call|>' + call.function.name + '<|sep|>' + call.function.arguments + '<|/call|>' }}"
        "{{- '' if loop.last else '\n' }}{%- endfor %}{{- '<|/calls|><|end|>' }}"
        "{%- elif m.role == 'assistant' %}{{- '<|Assistant|>' + m.content + '<|end|>' }}"
        "{%- elif m.role == 'tool' %}{{- '<|output|>' + m.content + '<|/output|>' }}"
        "{%- else %}{{- '<|User|>' + m.content }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|Assistant|>' }}{%- endif %}",
        {
            "bos_token": "<|begin|>",
            "eos_token": "<|end|>",
            "extra_special_tokens": [
                "<|User|>", "<|Assistant|>", "<|calls|>", "<|/calls|>", "<|call|>", "<|sep|>", "<|/call|>",
                "<|output|>", "<|/output|>",
            ],
        },
        [
            '<|calls|><|call|>get_weather<|sep|>{"city": "Paris"}<|/call|><|/calls|><|end|>',
            "It is 21.<|end|>",
            '<|calls|><|call|>get_weather<|sep|>{"city": "Rome"}<|/call|>\n'
            '<|call|>get_weather<|sep|>{"city": "Oslo"}<|/call|><|/calls|><|end|>',
            "Rome has 30, Oslo 9.<|end|>",
        ],
    ),
    "gpt-oss": ToolStyle(  # a call ends with a token of its own, and thoughts are a message of their own
        "{%- set called = namespace(name='') %}"
        "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- if m.thinking %}"
        "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}"
        "{%- for call in m.tool_calls or [] %}{%- set called.name = call.function.name %}"
        "{{- '<|start|>assistant to=' + call.function.name + '<|channel|>commentary' }}"
        "{{- '<|message|>' + (call.function.arguments | tojson) + '<|call|>' }}{%- else %}"
        "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{%- endfor %}"
        "{%- elif m.role == 'tool' %}{{- '<|start|>' + called.name + ' to=assistant<|message|>' }}"
        "{{- (m.content | tojson) + '<|end|>' }}"
        "{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}",
        {
            "eos_token": "<|return|>",
            "extra_special_tokens": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"],
        },
        [
            ' to=get_weather<|channel|>commentary<|message|>{"city": "Paris"}<|call|>',
            "<|channel|>final<|message|>It is 21.<|end|>",
            ' to=get_weather<|channel|>commentary<|message|>{"city": "Rome"}<|call|>'
            '<|start|>assistant to=get_weather<|channel|>commentary<|message|>{"city": "Oslo"}<|call|>',
            "<|channel|>final<|message|>Rome has 30, Oslo 9.<|return|>",
        ],
    ),
}  # fmt: skip
