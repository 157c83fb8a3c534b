"""A small byte-level tokenizer with two chat templates of its own, and one per family with the family's control tokens.

STOCK are templates in the shape of those that the families' models bring along: without generation blocks, and with
what makes each hard to mask.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from launcher.data.chat.encode import Encoder
from launcher.data.documents import Document
from launcher.data.read.rows import Conversation, Message, Row, RowFault
from launcher.recipe.data_section import DataSection

CONTROL = ["<|bos|>", "<|head|>", "<|/head|>", "<|eot|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
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


@pytest.fixture(scope="session")
def backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


MakeTokenizer = Callable[[str | None], PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer(backend: Tokenizer) -> MakeTokenizer:
    def make(template: str | None) -> PreTrainedTokenizerFast:
        """A tokenizer with the template of that name, or with the template text itself; None gives it none."""
        return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=Tokenizer.from_str(backend.to_str()),
            bos_token="<|bos|>",
            eos_token="<|eot|>",
            pad_token="<|pad|>",
            additional_special_tokens=["<|head|>", "<|/head|>", "<|im_start|>", "<|im_end|>"],
            chat_template=TEMPLATES.get(template, template) if template else None,
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer("llama3")


@pytest.fixture(scope="session")
def make_family() -> Callable[..., PreTrainedTokenizerFast]:
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bare.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )

    def make(family: str, *, template: str | None = None) -> PreTrainedTokenizerFast:
        """A tokenizer with the family's control tokens; its pad token is its end token."""
        tokens = FAMILY_TOKENS[family]
        made = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=Tokenizer.from_str(bare.to_str()),
            **tokens,
            pad_token=tokens["eos_token"],
            chat_template=template,
        )
        if family == "qwen3":
            made.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
        return made

    return make


@pytest.fixture(scope="session")
def stock() -> dict[str, str]:
    return STOCK


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes rows (objects as JSON, bytes as they are), a line each, and gives the path."""

    def write_rows(rows: list[Any], name: str = "rows.jsonl") -> str:
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return write_rows


def chat(*turns: str, answer: int | None = None) -> Conversation:
    """Turns as "role: content"."""
    return Conversation(tuple(Message(*turn.split(": ", 1)) for turn in turns), where="rows.jsonl:3", answer=answer)


MANY_TURNS = chat(
    "system: You are a terse dictionary.",
    "user: Define the word: harbour",
    "assistant: a sheltered place for ships",
    "user: Thank you. What is 漢字?",
    "assistant: Numbers 012 and accents: é ü",
    "user: Bye",
    "assistant: You are welcome!",
)


def encoder(tokenizer: PreTrainedTokenizerFast, **options: Any) -> Encoder:
    return Encoder(tokenizer, data=DataSection.model_validate({"sources": [{"path": "unread.jsonl"}], **options}))


def encode(tokenizer: PreTrainedTokenizerFast, *rows: Row, **options: Any) -> list[Document]:
    documents = []
    for item in encoder(tokenizer, **options).encode(rows):
        if isinstance(item, RowFault):
            raise item
        documents.append(item)
    return documents


def supervised_runs(tokenizer: PreTrainedTokenizerFast, document: Document) -> list[str]:
    """The text of each unbroken run of supervised tokens."""
    runs: list[list[int]] = [[]]
    for token, supervised in zip(document.input_ids.tolist(), document.supervised.tolist(), strict=True):
        if supervised:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [str(tokenizer.decode(run)) for run in runs if run]


def supervised_text(tokenizer: PreTrainedTokenizerFast, document: Document) -> str:
    """What the loss sees, with | where it is interrupted."""
    return "|".join(supervised_runs(tokenizer, document))


def same(one: list[Document], other: list[Document]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.supervised, b.supervised)
        for a, b in zip(one, other, strict=True)
    )
