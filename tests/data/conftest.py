"""A small byte-level tokenizer, with chat templates of the two common shapes, with and without an assistant mask."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CONTROL = ["<|bos|>", "<|head|>", "<|/head|>", "<|eot|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "You are a terse dictionary. Define the word: harbour, a sheltered place for ships.",
    "system user assistant Hello there, what is a river? A river is a stream of water that flows to the sea.",
    "Thank you. You are welcome! Numbers 0123456789 and accents: é ü 漢字 emoji.",
]
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|head|>' + m['role'] + '<|/head|>\n\n' }}"
    "{%- if m['role'] == 'assistant' %}{% generation %}{{- m['content'] | trim + '<|eot|>' }}{% endgeneration %}"
    "{%- else %}{{- m['content'] | trim + '<|eot|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\n\n' }}{%- endif %}"
)
CHATML = (
    "{%- for m in messages %}{%- if loop.index0 > 0 and m['role'] == 'system' %}"
    "{{- raise_exception('a system message comes first') }}{%- endif %}{{- '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['role'] == 'assistant' %}{% generation %}{{- m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{%- else %}{{- m['content'] + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def _plain(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "llama3-plain": _plain(LLAMA3), "chatml-plain": _plain(CHATML)}


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


MakeTokenizer = Callable[[str], PreTrainedTokenizerFast]


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


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes rows (objects as JSON, bytes as they are), a line each, and gives the path."""

    def write_rows(rows: list[Any], name: str = "rows.jsonl") -> str:
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return write_rows
