"""Chat templates that write what the models' own ones write, for the chats of tests/data/chat/stock_templates.txt.

They are written for these tests. But for what a comment names, each was compared with the text that its model brings
along, as llama.cpp, TRL and Axolotl keep it, and gave the same characters for every chat of the table; what becomes of
the role developer and of reasoning_content was read there. Tokens and stop tokens are those of the models' tokenizers
and generation_config.json. A default system text that is long is shortened.
"""

from typing import NamedTuple


class StockTemplate(NamedTuple):
    """`stops`: the tokens of generation_config.json's eos_token_id. `special`: beside bos, eos and stops."""

    template: str
    stops: tuple[str, ...]
    eos: str
    special: tuple[str, ...] = ()
    bos: str = ""


NO_DEVELOPER = "{% set messages = messages | rejectattr('role', 'equalto', 'developer') | list %}"  # nothing written
FOR, END = "{% for m in messages %}", "{% endfor %}"
SYSTEM_APART = (  # `rules`: the system's text, "" without; `chat`: the messages behind it
    "{% set has_rules = messages[0].role == 'system' %}{% set rules = messages[0].content if has_rules else '' %}"
    "{% set chat = messages[1:] if has_rules else messages %}"
)
KNOWN_FOR, KNOWN_APART = NO_DEVELOPER + FOR, NO_DEVELOPER + SYSTEM_APART
ALTERNATE = (
    "{% for m in chat %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('user and assistant must alternate') }}{% endif %}{% endfor %}"
)
CUT_THOUGHTS = "m.content.split('</think>')[-1]"


def _prompt(text: str, otherwise: str = "") -> str:
    return f"{{% if add_generation_prompt %}}{{{{ '{text}' }}}}{{% else %}}{otherwise}{{% endif %}}"


def _chatml(default: str, prompt: str = "", content: str = "m.content") -> str:
    """`default`: the system text of a chat without one; `content`: of a message, as Jinja."""
    return (
        f"{SYSTEM_APART}{{% if rules or {default!r} %}}{{{{ '<|im_start|>system\\n' + (rules or {default!r}) + "
        f"'<|im_end|>\\n' }}}}{{% endif %}}{{% for m in chat %}}{{{{ '<|im_start|>' + m.role + '\\n' + {content} + "
        "'<|im_end|>\\n' }}{% endfor %}" + _prompt("<|im_start|>assistant\\n" + prompt)
    )


LLAMA3 = StockTemplate(  # Llama 3.1 and 3.3; 3.2 differs in asking for today's date
    "{{ bos_token }}" + SYSTEM_APART + "{{ '<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' + rules + '<|eot_id|>' }}"
    "{% for m in chat %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
    "<|eot_id|>{% endfor %}" + _prompt("<|start_header_id|>assistant<|end_header_id|>\\n\\n"),
    stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    eos="<|eot_id|>",
    special=("<|start_header_id|>", "<|end_header_id|>"),
    bos="<|begin_of_text|>",
)
LLAMA32 = LLAMA3._replace(template=LLAMA3.template.replace("26 Jul 2024", "' + strftime_now('%d %b %Y') + '"))
QWEN = StockTemplate("", stops=("<|im_end|>", "<|endoftext|>"), eos="<|im_end|>", special=("<|im_start|>",))
QUESTION = (  # the place of the last question
    "{% set at = namespace(last=-1) %}{% for m in chat %}{% if m.role == 'user' %}{% set at.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
THOUGHTS = (  # `thoughts` and `answer` of a message
    "{% set thoughts, answer = m.reasoning_content or '', m.content %}"
    "{% if m.role == 'assistant' and not thoughts and '</think>' in answer %}"
    "{% set thoughts = answer.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set answer = answer.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)


def _qwen3(condition: str, prompt: str = "") -> str:
    """`condition`: which answers have a block for thoughts."""
    return (
        f"{SYSTEM_APART}{{% if rules %}}{{{{ '<|im_start|>system\n' + rules + '<|im_end|>\n' }}}}{{% endif %}}"
        f"{QUESTION}{{% for m in chat %}}{THOUGHTS}{{{{ '<|im_start|>' + m.role + '\n' }}}}"
        f"{{% if m.role == 'assistant' and {condition} %}}"
        "{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}"
        "{{ answer + '<|im_end|>\n' }}{% endfor %}" + _prompt("<|im_start|>assistant\\n" + prompt)
    )


GEMMA = (
    "{{ bos_token }}" + SYSTEM_APART + "NO_SYSTEM" + ALTERNATE + "{% for m in chat %}{{ '<start_of_turn>' + "
    "('model' if m.role == 'assistant' else m.role) + '\n' + (rules + '\n\n' if rules and loop.first else '') }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}" + _prompt("<start_of_turn>model\\n")
)
GEMMA2 = StockTemplate(
    GEMMA.replace("NO_SYSTEM", "{% if has_rules %}{{ raise_exception('System role not supported') }}{% endif %}"),
    stops=("<eos>", "<end_of_turn>"),
    eos="<eos>",
    special=("<start_of_turn>",),
    bos="<bos>",
)


def _mistral(user: str, assistant: str, *, at: str = "loop.first", rules_apart: str = "") -> str:
    """`user`: a question's text, with RULES where the system's text stands; `at`: in which question that is."""
    question = user.replace("RULES", f"' + (rules + '\n\n' if rules and {at} else '') + '")
    return (
        "{{ bos_token }}" + SYSTEM_APART + rules_apart + ALTERNATE + "{% for m in chat %}{% if m.role == 'user' %}"
        f"{{{{ '{question}' }}}}{{% else %}}{{{{ {assistant} + eos_token }}}}{{% endif %}}{{% endfor %}}"
    )


MISTRAL = StockTemplate("", stops=("</s>",), eos="</s>", special=("[INST]", "[/INST]"), bos="<s>")
PHI3 = StockTemplate(  # Phi-3 and 3.5 mini
    KNOWN_FOR
    + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
    + END
    + _prompt("<|assistant|>\\n", "{{ eos_token }}"),
    stops=("<|end|>", "<|assistant|>", "<|endoftext|>"),
    eos="<|endoftext|>",
    special=("<|user|>", "<|system|>"),
)
COMMAND_R = StockTemplate(
    "{{ bos_token }}" + SYSTEM_APART + ALTERNATE + "{% set open = '<|START_OF_TURN_TOKEN|>' %}{% if rules %}"
    "{{ open + '<|SYSTEM_TOKEN|>' + rules + eos_token }}{% endif %}{% for m in chat %}{{ open + ('<|USER_TOKEN|>' if "
    "m.role == 'user' else '<|CHATBOT_TOKEN|>') + m.content | trim + eos_token }}{% endfor %}"
    + _prompt("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
    stops=("<|END_OF_TURN_TOKEN|>",),
    eos="<|END_OF_TURN_TOKEN|>",
    special=("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    bos="<BOS_TOKEN>",
)
DEEPSEEK = StockTemplate(  # V3 and the R1 distilled models: the generation prompt opens thoughts that no turn has
    "{{ bos_token }}" + KNOWN_APART + "{{ rules }}{% for m in chat %}{% if m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% endif %}{% endfor %}" + _prompt("<｜Assistant｜><think>\\n"),
    stops=("<｜end▁of▁sentence｜>",),
    eos="<｜end▁of▁sentence｜>",
    special=("<｜User｜>", "<｜Assistant｜>"),
    bos="<｜begin▁of▁sentence｜>",
)
GLM = StockTemplate(  # GLM-4: no end token of a turn
    "[gMASK]<sop>" + FOR + "{{ '<|' + m.role + '|>\n' + m.content }}" + END + _prompt("<|assistant|>\\n"),
    stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
    eos="<|endoftext|>",
    special=("[gMASK]", "<sop>", "<|assistant|>", "<|system|>"),
)
GLM46 = GLM._replace(
    template="[gMASK]<sop>" + KNOWN_APART + "{% if rules %}{{ '<|system|>\n' + rules }}{% endif %}" + QUESTION
    + "{% for m in chat %}" + THOUGHTS + "{% if m.role == 'user' %}{{ '<|user|>\n' + m.content }}{% else %}"
    "{{ '<|assistant|>\n<think>' + (thoughts if loop.index0 > at.last else '') + '</think>\n' + answer | trim }}"
    "{% endif %}{% endfor %}" + _prompt("<|assistant|>")
)  # fmt: skip
GPT_OSS = StockTemplate(  # only the chat's last answer ends in the token that stops generation
    "<|start|>system<|message|>{{ 'You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: ' + strftime_now('%Y-%m-%d') + '\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>' }}"
    + SYSTEM_APART.replace("== 'system'", "in ['system', 'developer']")
    + "{% if rules %}{{ '<|start|>developer<|message|># Instructions\n\n' + rules + '\n\n<|end|>' }}"
    "{% endif %}{% for m in chat %}{% if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{% else %}{% if m.thinking and loop.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}"
    + _prompt("<|start|>assistant"),
    stops=("<|return|>", "<|endoftext|>", "<|call|>"),
    eos="<|return|>",
    special=("<|start|>", "<|message|>", "<|channel|>", "<|end|>"),
    bos="<|startoftext|>",
)  # fmt: skip


def _granite(default: str) -> str:
    turn = "'<|start_of_role|>' + {} + '<|end_of_role|>' + {} + '<|end_of_text|>\n'"
    return (
        f"{SYSTEM_APART}{{{{ {turn.format(repr('system'), f'(rules or {default})')} }}}}{{% for m in chat %}}"
        f"{{{{ {turn.format('m.role', 'm.content')} }}}}{{% endfor %}}"
        + _prompt("<|start_of_role|>assistant<|end_of_role|>")
    )


GRANITE = StockTemplate(
    "",
    stops=("<|end_of_text|>",),
    eos="<|end_of_text|>",
    special=("<|start_of_role|>", "<|end_of_role|>"),
    bos="<|end_of_text|>",
)
OLMO2 = StockTemplate(  # the text was not found: as Tülu 3's, whose recipe OLMo 2 follows, with a begin token
    "{{ bos_token }}"
    + KNOWN_FOR
    + "{{ '<|' + m.role + '|>\n' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% if m.role != 'assistant' or not loop.last %}{{ '\n' }}{% endif %}"
    + END
    + _prompt("<|assistant|>\\n"),
    stops=("<|endoftext|>",),
    eos="<|endoftext|>",
    bos="<|endoftext|>",
)
NEMOTRON2 = StockTemplate(  # Nano v2: the last answer, and only that, stands behind an opening of thoughts
    KNOWN_APART + "{{ '<SPECIAL_10>System\n' + rules + '\n\n' }}{% for m in chat %}{% if m.role == 'user' %}"
    "{{ '<SPECIAL_11>User\n' + m.content + '\n' }}{% else %}{{ '<SPECIAL_11>Assistant\n' }}{% if loop.last %}"
    "{{ '<think>\n' + m.content }}{% else %}{{ m.content.split('</think>')[-1] | trim }}{% endif %}"
    "{{ '\n<SPECIAL_12>\n' }}{% endif %}{% endfor %}" + _prompt("<SPECIAL_11>Assistant\\n<think>\\n"),
    stops=("</s>", "<SPECIAL_12>"),
    eos="</s>",
    special=("<SPECIAL_10>", "<SPECIAL_11>"),
)
NEMOTRON3 = (  # Nano: an empty block of thoughts where there are none
    SYSTEM_APART + "{{ '<|im_start|>system\n' + rules + '<|im_end|>\n' }}" + QUESTION + "{% for m in chat %}"
    "{% set text = m.content %}{% if m.reasoning_content %}"
    "{% set text = '<think>\n' + m.reasoning_content + '\n</think>\n' + text %}{% endif %}"
    "{% if m.role == 'assistant' and '</think>' not in text %}"
    "{% set text = '<think></think>' + text %}{% elif m.role == 'assistant' and loop.index0 < at.last %}"
    "{% set text = '<think></think>' + text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    + _prompt("<|im_start|>assistant\\n<think>\\n")
)
SMOLLM3 = (  # reasoning on, and without the marks of the model's own file; its default text is longer
    SYSTEM_APART + "{{ '<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nReasoning Mode: /think\n\n"
    "## Custom Instructions\n\n' + (rules or 'DEFAULT') + '\n\n<|im_end|>\n' }}{% for m in chat %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    + _prompt("<|im_start|>assistant\\n")
)
GEMMA4 = StockTemplate(  # of the assistant's thoughts only what a channel holds is cut
    "{{ bos_token }}"
    + FOR
    + "{{ '<|turn>' + ({'assistant': 'model', 'developer': 'system'}[m.role] or m.role) + '\n' + m.content | trim + "
    "'<turn|>\n' }}" + END + _prompt("<|turn>model\\n<|channel>thought\\n<channel|>"),
    stops=("<eos>", "<turn|>", "<|tool_response>"),
    eos="<turn|>",
    special=("<|turn>", "<|channel>", "<channel|>"),
    bos="<bos>",
)

STOCK_TEMPLATES = {
    "llama-3.1": LLAMA3,
    "llama-3.2": LLAMA32,
    "qwen2.5": QWEN._replace(
        template=NO_DEVELOPER + _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
    ),
    "qwen3": QWEN._replace(template=NO_DEVELOPER + _qwen3("loop.index0 > at.last and (loop.last or thoughts)")),
    "qwen3.5": QWEN._replace(
        template="{% for m in messages if m.role == 'developer' %}{{ raise_exception('Unexpected message role.') }}"
        "{% endfor %}" + _qwen3("loop.index0 > at.last", "<think>\\n")
    ),
    "gemma-2": GEMMA2,
    "gemma-3": GEMMA2._replace(template=GEMMA.replace("NO_SYSTEM", "")),
    "gemma-4": GEMMA4,
    "mistral-v1": MISTRAL._replace(
        template=_mistral(" [INST] RULES' + m.content + ' [/INST]", "' ' + m.content"),
        special=(),
    ),
    "mistral-v3": MISTRAL._replace(
        template=_mistral("[INST] RULES' + m.content + '[/INST]", "' ' + m.content | trim", at="loop.last")
    ),
    "mistral-nemo": MISTRAL._replace(  # v3 tekken
        template=_mistral("[INST]RULES' + m.content + '[/INST]", "m.content", at="loop.last")
    ),
    "mistral-small-3.2": MISTRAL._replace(  # v7 tekken; its default text is longer
        template=_mistral(
            "[INST]' + m.content + '[/INST]",
            "m.content",
            rules_apart="{{ '[SYSTEM_PROMPT]' + (rules or 'DEFAULT') + '[/SYSTEM_PROMPT]' }}",
        ),
        special=("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    "phi-3": PHI3,
    "phi-4": StockTemplate(  # the question brings the answer's header along
        KNOWN_FOR
        + "{% if m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}{% else %}{{ '<|im_start|>' + m.role + "
        "'<|im_sep|>' + m.content + '<|im_end|>' }}{{ '<|im_start|>assistant<|im_sep|>' if m.role == 'user' else '' }}"
        "{% endif %}" + END,
        stops=("<|im_end|>",),
        eos="<|im_end|>",
        special=("<|im_start|>", "<|im_sep|>"),
    ),
    "command-r": COMMAND_R,
    "command-r7b": COMMAND_R._replace(  # the generation prompt ends every chat; its default text is longer
        template="{{ bos_token }}" + SYSTEM_APART + "{% set open = '<|START_OF_TURN_TOKEN|>' %}"
        "{{ open + '<|SYSTEM_TOKEN|>DEFAULT' + rules + eos_token }}{% for m in chat %}{% if m.role == 'user' %}"
        "{{ open + '<|USER_TOKEN|>' + m.content + eos_token }}{% else %}{{ open + '<|CHATBOT_TOKEN|>' + "
        "'<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' + eos_token }}{% endif %}{% endfor %}"
        "{{ open + '<|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|>' }}",
        special=COMMAND_R.special + tuple(f"<|{a}_{b}|>" for a in ("START", "END") for b in ("RESPONSE", "THINKING")),
    ),
    "deepseek": DEEPSEEK,
    "glm-4": GLM,
    "glm-4.6": GLM46,
    "gpt-oss": GPT_OSS,
    "smollm3": QWEN._replace(template=NO_DEVELOPER + SMOLLM3),
    "granite-3.3": GRANITE._replace(
        template=_granite(
            "'Knowledge Cutoff Date: April 2024. Today\\'s Date: ' + strftime_now('%B %d, %Y') + '. You are Granite, "
            "developed by IBM. You are a helpful AI assistant.'"
        )
    ),
    "granite-4.0": GRANITE._replace(
        template=NO_DEVELOPER
        + _granite("'You are a helpful assistant. Please ensure responses are professional, accurate, and safe.'")
    ),
    "olmo-2": OLMO2,
    "nemotron-nano-2": NEMOTRON2,
    "nemotron-3-nano": QWEN._replace(template=NEMOTRON3),
}
