"""How stock templates write a turn of one tool call `f` and the result `m` of a tool; compared like the others."""

from tests.support.stock_templates import STOCK_TEMPLATES

JSON_CALL = '{"name": "\' + f.name + \'", "arguments": \' + f.arguments | tojson + \'}'
HERMES = f"<tool_call>\n{JSON_CALL}\n</tool_call>"
XML = (  # of one argument
    "<tool_call>\n<function=' + f.name + '>\n<parameter=' + (f.arguments | list)[0] + '>\n' + "
    "(f.arguments.values() | list)[0] + '\n</parameter>\n</function>\n</tool_call>"
)
RESULT = "<tool_response>\n' + m.content + '\n</tool_response>"
OPEN = "<|im_start|>assistant\n"
CHATML_RESULT = f"<|im_start|>user\n{RESULT}<|im_end|>\n"
BLOCK = "'<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n'"
MISTRAL_CALL = JSON_CALL[:-1] + ', "id": "\' + m.tool_calls[0].id + \'"}]</s>'
MISTRAL_RESULT = '{"content": \' + m.content + \', "call_id": "\' + m.tool_call_id + \'"}[/TOOL_RESULTS]'

CALLS = {  # the call, the result; as what stands between quotes in Jinja
    "llama-3.1": (
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "\' + f.name + \'", "parameters": \' + f.arguments | tojson + \'}<|eot_id|>',
        "<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>",
    ),
    "qwen2.5": (f"{OPEN}{HERMES}<|im_end|>\n", CHATML_RESULT),
    "qwen3": (f"{OPEN}' + ({BLOCK} if loop.last else '') + '{HERMES}<|im_end|>\n", CHATML_RESULT),
    "qwen3.5": (f"{OPEN}' + {BLOCK} + '{XML}<|im_end|>\n", CHATML_RESULT),
    "mistral-v3": (f"[TOOL_CALLS] [{MISTRAL_CALL}", f"[TOOL_RESULTS] {MISTRAL_RESULT}"),
    "mistral-nemo": (f"[TOOL_CALLS][{MISTRAL_CALL}", f"[TOOL_RESULTS]{MISTRAL_RESULT}"),
    "mistral-small-3.2": (
        "[TOOL_CALLS]' + f.name + '[CALL_ID]' + m.tool_calls[0].id + '[ARGS]' + f.arguments | tojson + '</s>",
        "[TOOL_RESULTS]' + m.tool_call_id + '[TOOL_CONTENT]' + m.content + '[/TOOL_RESULTS]",
    ),
    "glm-4.6": (
        "<|assistant|>\n<think>' + (m.reasoning_content or '') + '</think>\n<tool_call>' + f.name + '\n<arg_key>' + "
        "(f.arguments | list)[0] + '</arg_key>\n<arg_value>' + (f.arguments.values() | list)[0] + '</arg_value>\n"
        "</tool_call>",
        f"<|observation|>\n{RESULT}",
    ),
    "gpt-oss": (
        "' + ('<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' if m.thinking else '') + '"
        "<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>' + f.arguments | tojson + "
        "'<|call|>",
        "<|start|>functions.sky to=assistant<|channel|>commentary<|message|>' + m.content | tojson + '<|end|>",
    ),
    "granite-4.0": (
        f"<|start_of_role|>assistant<|end_of_role|>{HERMES}<|end_of_text|>\n",
        f"<|start_of_role|>user<|end_of_role|>\n{RESULT}<|end_of_text|>\n",
    ),
    "nemotron-3-nano": (
        f"{OPEN}<think>' + ('\n' + m.reasoning_content + '\n' if m.reasoning_content else '') + '</think>\n"
        f"{XML}\n<|im_end|>\n",
        f"<|im_start|>user\n{RESULT}\n<|im_end|>\n",
    ),
    "gemma-4": (  # results stand in the call's turn, which goes on with the answer
        "<|turn>model\n<|tool_call>call:' + f.name + '{' + (f.arguments | list)[0] + ':<|\"|>' + "
        "(f.arguments.values() | list)[0] + '<|\"|>}<tool_call|><|tool_response>",
        "response:sky{value:<|\"|>' + m.content + '<|\"|>}<tool_response|>",
    ),
}
LOOP, END = "{% for m in chat %}", "{% endfor %}"


def with_calls(name: str) -> str:
    """The stock template of this name, which also writes calls and results."""
    template = STOCK_TEMPLATES[name].template.replace("{% for m in messages %}", "{% set chat = messages %}" + LOOP)
    plain = "chat if m.role != 'tool' and not m.tool_calls %}{% if m.role != ['user'"
    template = template.replace("chat %}{% if m.role != ['user'", plain)
    head, _, rest = template.rpartition(LOOP)
    body, _, tail = rest.partition(END)
    if name == "gemma-4":
        opening = "'<|turn>' + ({'assistant': 'model', 'developer': 'system'}[m.role] or m.role) + '\n'"
        assert opening in body
        body = body.replace(opening, f"('' if loop.index0 and chat[loop.index0 - 1].role == 'tool' else {opening})")
        tail = tail.replace("if add_generation_prompt", "if add_generation_prompt and chat[-1].role != 'tool'")
    call, result = CALLS[name]
    return (
        f"{head}{LOOP}{{% if m.tool_calls %}}{{% set f = m.tool_calls[0].function %}}{{{{ '{call}' }}}}"
        f"{{% elif m.role == 'tool' %}}{{{{ '{result}' }}}}{{% else %}}{body}{{% endif %}}{END}{tail}"
    )
