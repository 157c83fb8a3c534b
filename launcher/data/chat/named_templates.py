"""The chat templates that ship here, for tokenizers without one: data.template names one of templates/*.jinja.

Each writes what its family's own template writes for system, user and assistant messages, and marks the assistant's
part with `generation` blocks, so that transformers' assistant mask and ours agree.

To add one: a file in templates/, its tokens here, its name in DataSection.template, and `pytest -k templates`.
"""

import re
from datetime import datetime
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from launcher.errors import DataError

FOLDER = Path(__file__).parent / "templates"

CONTROL = {  # strings of a template that must be special tokens: those end a turn, plain text cannot
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "mistral": ("<s>", "[INST]", "[/INST]", "</s>"),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
}
DATE = datetime(2024, 7, 26)  # the default of Llama 3.1's own template, where it knows no date
ADDED_TOKENS = {"qwen3": ("<think>", "</think>")}  # one added token each, which a message may spell out


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens by id, also those without a role in the tokenizer (Llama 3's header marks)."""
    return {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def missing_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """The tokens that the template needs and the tokenizer lacks."""
    control, added = control_tokens(tokenizer).values(), tokenizer.get_added_vocab()
    missing = [token for token in CONTROL[name] if token not in control]
    return missing + [token for token in ADDED_TOKENS.get(name, ()) if token not in added]


def fitting_templates(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Names of the templates that this tokenizer can use."""
    return [name for name in CONTROL if not missing_tokens(tokenizer, name)]


def put_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Set the tokenizer's chat template, which is saved with it. Raises DataError if the tokenizer lacks its tokens."""
    if missing := missing_tokens(tokenizer, name):
        fitting = fitting_templates(tokenizer)
        instead = f"data.template={' or '.join(fitting)}" if fitting else "data.template=auto; no other fits either"
        raise DataError(
            f"data.template={name} needs a tokenizer with its control tokens.\n"
            f"Found: {tokenizer.name_or_path or 'this tokenizer'} lacks {', '.join(missing)}.\nSet {instead}."
        )
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def without_today(template: str) -> str:
    """The template with DATE for today, if it asks for today (strftime_now, as Llama 3.2's own does).

    Otherwise the data would differ from day to day, and between ranks across midnight. The tokenizer keeps its own.

    It is a macro before the template, since transformers passes templates plain data, no functions. Jinja removes the
    newline after the macro, so the template still begins a line.
    """
    if "strftime_now" not in template:
        return template
    codes = sorted(set(re.findall("%-?[aAbBcdHIjmMpSUwWxXyYZ]", template)))
    replacements = "".join(f".replace({code!r}, {DATE.strftime(code)!r})" for code in codes)
    return "{%- macro strftime_now(format) %}{{ format" + replacements + " }}{% endmacro %}\n" + template
