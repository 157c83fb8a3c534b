"""Chat templates and control tokens of the test tokenizers.

STOCK are templates in the shape of those that the families' models bring along: without generation blocks, and with
what makes each hard to mask.
"""

from typing import Any

OWN_TOKENS = {
    "bos_token": "<|bos|>",
    "eos_token": "<|eot|>",
    "pad_token": "<|pad|>",
    "extra_special_tokens": ["<|head|>", "<|/head|>", "<|im_start|>", "<|im_end|>"],
}
CORPUS = [
    "You are a terse dictionary. Define the word: harbour, a sheltered place for ships.",
    "system user assistant Hello there, what is a river? A river is a stream of water that flows to the sea.",
    "Thank you. You are welcome! Numbers 0123456789 and accents: é ü 漢字 emoji.",
]
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|head|>' + m['role'] + '<|/head|>\n\n' }}"
    "{{- m['content'] | trim + '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\n\n' }}{%- endif %}"
)
CHATML = (
    "{%- for m in messages %}{%- if loop.index0 > 0 and m['role'] == 'system' %}"
    "{{- raise_exception('a system message comes first') }}{%- endif %}"
    "{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML}

STOCK = {
    # A system turn always, with a date; the user's system text goes into it.
    "llama3": (
        "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set rules = messages[0]['content'] | trim %}"
        "{%- set chat = messages[1:] %}{%- else %}{%- set rules = '' %}{%- set chat = messages %}{%- endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: 1 Jan 2025\n\n' + rules + '<|eot_id|>' }}"
        "{%- for m in chat %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{{- m['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    ),
    # A default system turn, and a newline behind each end token.
    "chatml": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # No generation prompt: the answer follows the question's last token.
    "mistral": (
        "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set rules = messages[0]['content'] %}"
        "{%- set chat = messages[1:] %}{%- else %}{%- set chat = messages %}{%- endif %}{%- for m in chat %}"
        "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles alternate') }}{%- endif %}"
        "{%- if m['role'] == 'user' %}{%- if loop.first and rules is defined %}"
        "{{- '[INST] ' + rules + '\n\n' + m['content'] + '[/INST]' }}"
        "{%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}"
        "{%- else %}{{- ' ' + m['content'] | trim + eos_token }}{%- endif %}{%- endfor %}"
    ),
    # The assistant's role has another name.
    "gemma": (
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set rules = messages[0]['content'] + '\n\n' %}"
        "{%- set chat = messages[1:] %}{%- else %}{%- set rules = '' %}{%- set chat = messages %}{%- endif %}"
        "{%- for m in chat %}{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + (rules if loop.first else '') }}"
        "{{ m['content'] | trim }}{{ '<end_of_turn>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{%- endif %}"
    ),
    # Earlier turns lose their thinking, the last one always has a block for it.
    "qwen3": (
        "{%- set ns = namespace(last=messages | length - 1, found=false) %}{%- for m in messages[::-1] %}"
        "{%- if m.role == 'user' and not ns.found %}{%- set ns.found = true %}"
        "{%- set ns.last = messages | length - 1 - loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}{%- set content = m.content %}{%- set thought = '' %}"
        "{%- if m.role == 'assistant' and '</think>' in content %}"
        "{%- set thought = (content.split('</think>') | first).rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{%- set content = (content.split('</think>') | last).lstrip('\n') %}{%- endif %}"
        "{{- '<|im_start|>' + m.role + '\n' }}"
        "{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
        "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
        "{%- else %}{{- content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
}
FAMILY_TOKENS: dict[str, dict[str, Any]] = {
    "llama3": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "extra_special_tokens": ["<|start_header_id|>", "<|end_header_id|>"],
    },
    "chatml": {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["[INST]", "[/INST]"]},
    "gemma": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "extra_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
    },
    "qwen3": {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]},
}
