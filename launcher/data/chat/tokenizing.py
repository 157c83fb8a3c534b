"""Rendered rows become token ids, with a mask of what the loss sees.

A token is supervised if it covers a character of a span. Tokens are asked for in Rust (char_to_token), a few calls a
span: lists of offsets in Python cost twice as much as all else here.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import EncodingFast

from launcher.data.chat.render import Rendered, Span
from launcher.data.documents import Bools, Document, Ints
from launcher.errors import DataError


class Tokeniser:
    """Raises DataError for a slow tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise DataError(
                "Masking needs a fast tokenizer: one that says which characters a token covers.\n"
                f"Found: {type(tokenizer).__name__}.\nUse a model whose folder holds a tokenizer.json."
            )
        # Called directly: the tokenizer around it halves the speed. Copies, since it changes its own at every call, and
        # two, since a switch thrown between calls would reach into those of other threads.
        self._backend = _copy(tokenizer.backend_tokenizer, literal=False)
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._control = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}

    @cached_property
    def _literal(self) -> Tokenizer:
        """Made when a row first needs it: half a second for a vocabulary of 150,000."""
        return _copy(self._backend, literal=True)

    def documents(self, rendered: Sequence[Rendered]) -> list[Document]:
        """One document for each."""
        encodings = iter(self._encode([item.text for item in rendered if not item.literals], literal=False))
        return [self._veiled(item) if item.literals else self._document(item, next(encodings)) for item in rendered]

    def _encode(self, texts: list[str], *, literal: bool) -> list[EncodingFast]:
        """`literal`: control-token strings are plain characters."""
        backend = self._literal if literal else self._backend
        return backend.encode_batch(texts, add_special_tokens=False)

    def _document(self, item: Rendered, encoding: EncodingFast) -> Document:
        ids, supervised = self._masked(encoding, item.spans)
        if item.framed:
            return self._framed(ids, supervised, item.spans)
        return Document(ids, supervised)

    def _veiled(self, item: Rendered) -> Document:
        """Piece by piece: what stand-ins hide are plain characters, all else may hold control tokens."""
        parts = []
        at = 0
        for piece, literal in item.pieces():
            [encoding] = self._encode([piece], literal=literal)
            parts.append(self._masked(encoding, _within(item.spans, at, at + len(piece))))
            at += len(piece)
        ids, supervised = zip(*parts, strict=True)
        return Document(np.concatenate(ids), np.concatenate(supervised))

    def _masked(self, encoding: EncodingFast, spans: Sequence[Span] | None) -> tuple[Ints, Bools]:
        ids = np.array(encoding.ids, dtype=np.int32)
        supervised = np.full(len(ids), spans is None)
        for span in spans or ():
            first, last = _first_covering(encoding, range(*span)), _first_covering(encoding, range(*span)[::-1])
            if first is None or last is None:
                continue
            if ids[first] in self._control and _begin(encoding, first) < span[0]:
                first += 1  # some control tokens take in the whitespace behind them, even that of the answer
            while last + 1 < len(ids) and _begin(encoding, last + 1) < span[1]:
                last += 1  # a character may be of several tokens
            supervised[first : last + 1] = True
        return ids, supervised

    def _framed(self, ids: Ints, supervised: Bools, spans: Sequence[Span] | None) -> Document:
        """bos + text + eos, where the tokenizer has them and the text does not bring them along."""
        if self._bos is not None and ids[:1] != [self._bos]:
            ids, supervised = np.insert(ids, 0, self._bos), np.insert(supervised, 0, spans is None)
        if self._eos is not None and ids[-1:] != [self._eos]:
            ids, supervised = np.append(ids, np.int32(self._eos)), np.append(supervised, spans is None or bool(spans))
        return Document(ids, supervised)


def _copy(backend: Tokenizer, *, literal: bool) -> Tokenizer:
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = literal
    return copy


def _first_covering(encoding: EncodingFast, chars: Iterable[int]) -> int | None:
    """The first token of the first of these characters that has one; a tokenizer may drop whitespace."""
    return next((token for char in chars if (token := encoding.char_to_token(char)) is not None), None)


def _begin(encoding: EncodingFast, token: int) -> int:
    chars = encoding.token_to_chars(token)
    return chars[0] if chars else 0


def _within(spans: Sequence[Span] | None, begin: int, end: int) -> list[Span] | None:
    """The parts of the spans inside a piece of the text, counted from its begin."""
    if spans is None:
        return None
    cut = [(max(start, begin) - begin, min(stop, end) - begin) for start, stop in spans]
    return [(start, stop) for start, stop in cut if start < stop]
