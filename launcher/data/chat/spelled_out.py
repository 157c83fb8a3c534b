"""Control tokens that a message spells out ("<|eot|>") stay plain characters: a message cannot end its own turn.

rendering     every such string becomes a stand-in: a private character, repeated to the string's length
tokenising    the strings are put back, and the template's control tokens are disguised instead. The backend sees the
              strings as characters and the disguises as added tokens, so that a row is tokenised in one piece: some
              tokenizers write a blank at the beginning of every piece.

The same holds for all that a template is given of a chat: tools and their calls, thoughts, names.

Only rows that spell out a control token pay for it. Thoughts between control tokens, at which a template splits the
assistant's content, are no such strings.
"""

import random
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import EncodingFast

from launcher.data.chat.named_templates import control_tokens
from launcher.data.documents import Ints
from launcher.data.read.messages import for_template
from launcher.data.read.rows import Conversation

Messages = list[dict[str, Any]]  # as templates take them; "content" is a string
Tools = list[dict[str, Any]]

BEGIN, END = "\U0010fffe", "\U0010ffff"  # marks that rendering puts into a chat to find places in it
PRIVATE = re.compile("[\U00100000-\U0010ffff]")  # Unicode's last plane


class SpelledOut:
    """The control tokens of a tokenizer, and how messages may spell them out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Two patterns: alternatives that begin with the same characters are found a hundred times faster than mixed.
        longest_first = sorted(control_tokens(tokenizer).values(), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        split_at = re.findall(r"""split\(\s*["']([^"']+)["']""", str(tokenizer.chat_template))
        hidden = [string for string in longest_first if string not in split_at]
        self._of_assistant = re.compile("|".join(map(re.escape, hidden)) or "(?!)")

    def hide(self, row: Conversation) -> tuple[Messages, Tools, dict[str, str]]:
        """Messages and tools with stand-ins, and the string of each; private characters are replaced too."""
        messages: Messages = list(map(for_template, row.messages)) if row.has_extra else []
        if not row.has_extra:
            messages = [{"role": m.role, "content": m.content} for m in row.messages]
            texts = "\n".join([message.content for message in row.messages])
            if not self.control.search(texts) and not PRIVATE.search(texts):
                return messages, [], {}
        stand_in: dict[str, str] = {}

        def hidden(value: Any, pattern: re.Pattern[str]) -> Any:
            if isinstance(value, str):
                if not pattern.search(value) and not PRIVATE.search(value):
                    return value
                return re.sub(
                    f"{pattern.pattern}|{PRIVATE.pattern}",
                    lambda m: stand_in.setdefault(m[0], chr(0x100000 + len(stand_in))) * len(m[0]),
                    value,
                )
            if isinstance(value, dict):
                return {hidden(key, pattern): hidden(item, pattern) for key, item in value.items()}
            return [hidden(item, pattern) for item in value] if isinstance(value, list) else value

        for message in messages:
            content = self._of_assistant if message["role"] == "assistant" else self.control
            for key, value in message.items():
                message[key] = hidden(value, content if key == "content" else self.control)
        tools = hidden(list(row.tools), self.control)
        return messages, tools, {char: string for string, char in stand_in.items()}

    def encode(self, text: str, stand_ins: Mapping[str, str]) -> tuple[EncodingFast, Ints]:
        """A rendered text's encoding, whose offsets fit the text, and its ids, without those of disguises."""
        backend, disguises, true_ids = self._disguised
        text = restored(self.control.sub(lambda match: disguises[match[0]], text), stand_ins)
        encoding = backend.encode(text, add_special_tokens=False)
        return encoding, np.array([true_ids.get(index, index) for index in encoding.ids], np.int32)

    @cached_property
    def _disguised(self) -> tuple[Tokenizer, dict[str, str], dict[int, int]]:
        """A backend that knows control tokens only by their disguises; those, and the ids that they stand for.

        A disguise is as long as its token, and drawn, so that no message can spell it out. Made when a row first needs
        it: half a second for a vocabulary of 150,000.
        """
        backend, draw = copy_of(self._tokenizer.backend_tokenizer), random.SystemRandom()
        backend.encode_special_tokens = True
        private = [*map(chr, range(0xF0000, 0xFFFFE))]
        disguises, true_ids = {}, {}
        for true_id, token in self._tokenizer.added_tokens_decoder.items():
            if token.special:
                disguise = disguises[token.content] = "".join(draw.choices(private, k=len(token.content)))
                flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
                backend.add_tokens([AddedToken(disguise, special=False, **flags)])
                if (index := backend.token_to_id(disguise)) is not None:
                    true_ids[index] = true_id
        return backend, disguises, true_ids


def restored(text: str, stand_ins: Mapping[str, str]) -> str:
    """The text with the strings that the stand-ins stand for."""
    for char, string in stand_ins.items():
        text = text.replace(char * len(string), string)
    return text


def copy_of(backend: Tokenizer) -> Tokenizer:
    """A tokenizer of its own, without truncation and padding, to which control tokens are control tokens."""
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = False
    return copy
