"""Chat templates in the style of well-known models, reduced to what decides where a turn begins and ends."""

from typing import Any, NamedTuple


class Style(NamedTuple):
    """`first` and `last`: what the loss sees of the answers "Hello there" (another question follows) and "Bye now"."""

    template: str
    first: str
    last: str
    tokens: tuple[str, ...]  # special ones beside bos and eos
    eos: str
    systems: tuple[bool, ...] = (False, True)  # chats without and with a system message that the template takes


def _turns(message: str, prompt: str, end: str = "") -> str:
    chat_end = f"{{% if not add_generation_prompt %}}{end}{{% endif %}}"
    return (
        f"{{% for m in messages %}}{message}{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
        f"{chat_end}"
    )


def _role(user: str, assistant: str) -> str:
    return (
        f"{{% if m.role == 'assistant' %}}{assistant}{{% elif m.role == 'system' %}}"
        f"{user.replace('user', 'system').replace('USER', 'SYSTEM')}{{% else %}}{user}{{% endif %}}"
    )


STYLES = {
    "command-r7b": Style(
        "{{ bos_token }}"
        + _turns(
            _role(
                "<|START|><|USER|>{{ m.content }}<|END_OF_TURN|>",
                "<|START|><|BOT|><|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|><|END_OF_TURN|>",
            ),
            "<|START|><|BOT|>",
        ),
        "<|START_RESPONSE|>Hello there<|END_RESPONSE|><|END_OF_TURN|>",
        "<|START_RESPONSE|>Bye now<|END_RESPONSE|><|END_OF_TURN|>",
        ("<|START|>", "<|USER|>", "<|SYSTEM|>", "<|BOT|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        "<|END_OF_TURN|>",
    ),
    "phi-3": Style(  # the chat's end has one more token than a turn's
        _turns("{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}", "{{ '<|assistant|>\n' }}", "{{ eos_token }}"),
        "Hello there<|end|>",
        "Bye now<|end|>\n<|endoftext|>",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "<|endoftext|>",
    ),
    "phi-4": Style(
        _turns(
            "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}", "<|im_start|>assistant<|im_sep|>"
        ),
        "Hello there<|im_end|>",
        "Bye now<|im_end|>",
        ("<|im_start|>", "<|im_sep|>"),
        "<|im_end|>",
    ),
    "gpt-oss": Style(  # answers end in another token where nothing follows; control tokens inside the turn
        "<|start|>system<|message|>You are helpful.<|end|>"
        + _turns(
            _role(
                "<|start|>user<|message|>{{ m.content }}<|end|>",
                "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
                "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}",
            ),
            "<|start|>assistant",
        ),
        "<|channel|>final<|message|>Hello there<|end|>",
        "<|channel|>final<|message|>Bye now<|return|>",
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>"),
        "<|return|>",
    ),
    "deepseek-r1": Style(
        "{{ bos_token }}"
        + _turns(
            _role("<User>{{ m.content }}", "<Assistant>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"),
            "{{ '<Assistant><think>\n' }}",
        ),
        "Hello there<|eos|>",
        "Bye now<|eos|>",
        ("<User>", "<Assistant>"),
        "<|eos|>",
    ),
    "glm-4": Style(  # no end token: the next question's opening ends a turn, which is no stop token here
        "[gMASK]<sop>" + _turns("{{ '<|' + m.role + '|>\n' + m.content }}", "<|assistant|>{{ '\n' }}"),
        "Hello there",
        "Bye now<|endoftext|>",
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
        "<|endoftext|>",
    ),
    "an end token at the chat's end alone": Style(
        _turns("{{ '<|' + m.role + '|>' + m.content }}", "<|assistant|>", "{{ eos_token }}"),
        "Hello there",
        "Bye now<|endoftext|>",
        ("<|user|>", "<|assistant|>", "<|system|>"),
        "<|endoftext|>",
    ),
    "end tokens as separators": Style(
        _turns(
            "{% if not loop.first %}{{ eos_token }}{% endif %}{{ '<|' + m.role + '|>' + m.content }}",
            "{{ eos_token }}<|assistant|>",
        ),
        "Hello there<|endoftext|>",
        "Bye now<|endoftext|>",
        ("<|user|>", "<|assistant|>", "<|system|>"),
        "<|endoftext|>",
    ),
    "mistral-v1": Style(  # [INST] is plain text, and a blank follows the end token
        "{{ bos_token }}"
        + _turns(
            "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
            "{{ m.content + eos_token + ' ' }}{% endif %}",
            "",
        ),
        "Hello there</s>",
        "Bye now</s>",
        (),
        "</s>",
        systems=(False,),
    ),
    "mistral-v3": Style(  # the system text goes into the last question
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set rules = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}"
        + _turns(
            "{% if m.role == 'user' %}{{ '[INST] ' + (rules + '\n\n' if rules and loop.last else '') + m.content "
            "+ '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}",
            "",
        ),
        " Hello there</s>",
        " Bye now</s>",
        ("[INST]", "[/INST]"),
        "</s>",
        systems=(False,),
    ),
    "mistral-tekken": Style(
        "{{ bos_token }}"
        + _turns(
            "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'system' %}"
            "[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% else %}{{ m.content + eos_token }}{% endif %}",
            "",
        ),
        "Hello there</s>",
        "Bye now</s>",
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "</s>",
    ),
    "granite": Style(  # a newline behind every end token, and a system turn always
        "{% if messages[0].role != 'system' %}<|role|>system<|/role|>You are Granite.<|eot|>\n{% endif %}"
        + _turns("{{ '<|role|>' + m.role + '<|/role|>' + m.content + '<|eot|>\n' }}", "<|role|>assistant<|/role|>"),
        "Hello there<|eot|>",
        "Bye now<|eot|>",
        ("<|role|>", "<|/role|>"),
        "<|eot|>",
    ),
    "needs a system message": Style(
        "{{ messages[0].content if messages[0].role == 'system' else raise_exception('no system') }}"
        + _turns(
            "{% if m.role != 'system' %}{{ '<|' + m.role + '|>' + m.content + eos_token + '\n' }}{% endif %}",
            "<|assistant|>",
        ),
        "Hello there<|eot|>",
        "Bye now<|eot|>",
        ("<|user|>", "<|assistant|>"),
        "<|eot|>",
        systems=(True,),
    ),
    "several end tokens": Style(  # with whitespace between them
        _turns("{{ '<|' + m.role + '|>' + m.content + '<|/text|>\n<|/turn|> ' + eos_token + '\n' }}", "<|assistant|>"),
        "Hello there<|/text|>\n<|/turn|> <|eot|>",
        "Bye now<|/text|>\n<|/turn|> <|eot|>",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|/text|>", "<|/turn|>"),
        "<|eot|>",
    ),
    "no control tokens": Style(
        _turns("{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}", "### assistant:\n"),
        "Hello there\n\n",
        "Bye now\n\n<|eot|>",
        (),
        "<|eot|>",
    ),
    "smollm3": Style(  # marks of its own, with the turn's header and the newline behind it
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' }}{% endif %}",
        "<|im_start|>assistant\nHello there<|im_end|>\n",
        "<|im_start|>assistant\nBye now<|im_end|>\n",
        ("<|im_start|>",),
        "<|im_end|>",
    ),
    "marks in a macro": Style(  # transformers' own record of them is wrong here
        "{% macro turn(m) %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}\n  {%- generation -%}  \n"
        "{{ m.content + eos_token }}{%- endgeneration %}{% else %}{{ m.content }}{% endif %}{% endmacro %}"
        "{% for m in messages %}{{ turn(m) }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "Hello there<|eot|>",
        "Bye now<|eot|>",
        ("<|user|>", "<|assistant|>", "<|system|>"),
        "<|eot|>",
    ),
    "marks without the end token": Style(
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "Hello there<|eot|>",
        "Bye now<|eot|>",
        ("<|user|>", "<|assistant|>", "<|system|>"),
        "<|eot|>",
    ),
}


def style_tokens(style: Style) -> dict[str, Any]:
    """The control tokens of a style's tokenizer."""
    return {"bos_token": "<|bos|>", "eos_token": style.eos, "extra_special_tokens": list(style.tokens)}
