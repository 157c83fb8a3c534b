"""Rows become documents: token ids, with a mask of the tokens that the loss sees.

    row -> what of it the loss sees -> text with spans of characters (render.py) -> token ids and mask

A token is supervised if it covers a character of a span. Control tokens spelled out in a message are plain characters.
In plain text they are control tokens, since text rendered beforehand is a usual source.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import EncodingFast

from launcher.data.chat.named_templates import control_tokens, fitting_templates, put_template
from launcher.data.chat.render import ChatRenderer, Rendered, Span, render_text
from launcher.data.documents import Bools, Document, Ints
from launcher.data.read.rows import Conversation, Message, Row, RowFault, Text
from launcher.errors import DataError, RecipeError
from launcher.recipe.data_section import DataSection


class EncodedRow(NamedTuple):
    """What the loss sees of a row ("assistant", "completion" or "all"), and the row's tokens, however many; or why the
    chat template gives none.
    """

    loss_on: str
    document: Document | RowFault


def resolve_loss_on(row: Row, choice: str) -> str:
    """What the loss sees of this row under data.loss_on: assistant, completion or all.

    Raises DataError if the choice has no meaning for the row.
    """
    if choice == "auto":
        plain = "assistant" if isinstance(row, Conversation) else "all"
        return plain if row.answer is None else "completion"
    if isinstance(row, Text) and (choice == "assistant" or (choice == "completion" and row.answer is None)):
        need, lack = ("chats", "assistant") if choice == "assistant" else ("prompts and completions", "completion")
        raise DataError(
            f"{row.where}: data.loss_on={choice} needs {need}.\nFound: plain text, which has no {lack}.\n"
            "Set data.loss_on=auto (assistant for chats, completion after prompts, all for text)."
        )
    return choice


class Encoder:
    """Turns rows into documents under data.template and data.loss_on, in this process.

    `template` says whose template renders chats: "the tokenizer's own", a name of data.template, or "none". A named one
    is put on the tokenizer, so that it is saved with it.

    Raises DataError: a slow tokenizer, or one without the control tokens of data.template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, data: DataSection) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise DataError(
                "Masking needs a fast tokenizer: one that says which characters a token covers.\n"
                f"Found: {type(tokenizer).__name__}.\nUse a model whose folder holds a tokenizer.json."
            )
        self.tokenizer, self.data = tokenizer, data
        self.template: str = data.template
        if data.template == "auto":
            self.template = "the tokenizer's own" if tokenizer.chat_template else "none"
        else:
            put_template(tokenizer, data.template)
        self._renderer = ChatRenderer(tokenizer, name=self.template)
        # The backend is called directly: the tokenizer around it halves the speed, and changes it at every call.
        self._backend = _copy(tokenizer.backend_tokenizer, plain=False)
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._control_ids = control_tokens(tokenizer).keys()

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow]:
        """Every row's document, in order, or the RowFault of a chat that the template refuses or cannot mask.

        Raises DataError for what is wrong with all rows: no chat template, a data.loss_on that does not fit.
        """
        losses = [resolve_loss_on(row, self.data.loss_on) for row in rows]
        rendered = [self._render(row, loss_on) for row, loss_on in zip(rows, losses, strict=True)]
        documents = self._tokenise(rendered)
        return [EncodedRow(loss_on, document) for loss_on, document in zip(losses, documents, strict=True)]

    def prompt(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """The conversation so far and the generation prompt, as text and as token ids.

        Raises DataError: no chat template, or it refuses the conversation.
        """
        row = Conversation(tuple(messages), where="the prompt")
        self._check_template(row)
        rendered = self._renderer.render_prompt(row)
        [document] = self._tokenise([rendered])
        assert isinstance(document, Document)
        return "".join(piece for piece, _ in rendered.pieces()), document.input_ids.tolist()

    def _check_template(self, row: Conversation) -> None:
        templates: Any = self.tokenizer.chat_template
        without_default = isinstance(templates, dict) and "default" not in templates
        if templates and not without_default:
            return
        fitting = " or ".join(fitting_templates(self.tokenizer))
        name = self.tokenizer.name_or_path or "this tokenizer"
        if without_default:
            raise RecipeError(
                "one of a tokenizer's named chat templates must be called default; "
                f"{name} has {', '.join(templates)}.\n"
                "Save the one that you mean as chat_template.jinja in the model's folder"
                + (f", or set data.template={fitting}." if fitting else ".")
            )
        remedy = f"Set data.template={fitting}, use" if fitting else "No template of data.template fits it: use"
        raise DataError(
            f"{row.where}: rows of messages need a tokenizer with a chat template, or data.template.\n"
            f"Found: none in {name}, and data.template=auto.\n"
            f'{remedy} an instruct model, or give the rows as {{"text": "..."}}.'
        )

    def _render(self, row: Row, loss_on: str) -> Rendered | RowFault:
        if isinstance(row, Text):
            return render_text(row, loss_on)
        self._check_template(row)
        try:
            return self._renderer.render(row, loss_on)
        except RowFault as fault:
            return fault

    def _tokenise(self, rendered: Sequence[Rendered | RowFault]) -> list[Document | RowFault]:
        texts = [item.text for item in rendered if isinstance(item, Rendered) and not item.stand_ins]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return [item if isinstance(item, RowFault) else self._document(item, encodings) for item in rendered]

    def _document(self, item: Rendered, encodings: Iterator[EncodingFast]) -> Document:
        if item.stand_ins:
            return self._document_of_pieces(item)
        ids, supervised = self._masked(next(encodings), item.spans)
        return self._framed(ids, supervised, item.spans) if item.framed else Document(ids, supervised)

    def _document_of_pieces(self, item: Rendered) -> Document:
        """Piece by piece: strings that stand-ins replaced are plain characters, the rest may hold control tokens."""
        parts = []
        start = 0
        for piece, plain in item.pieces():
            encoding = (self._plain_backend if plain else self._backend).encode(piece, add_special_tokens=False)
            parts.append(self._masked(encoding, _within(item.spans, start, start + len(piece))))
            start += len(piece)
        ids, supervised = zip(*parts, strict=True)
        return Document(np.concatenate(ids), np.concatenate(supervised))

    @cached_property
    def _plain_backend(self) -> Tokenizer:
        """Knows no control tokens. Made when a row first needs it: half a second for a vocabulary of 150,000.

        A second copy, since a switch thrown on one backend between calls would reach into those of other threads.
        """
        return _copy(self._backend, plain=True)

    def _masked(self, encoding: EncodingFast, spans: Sequence[Span] | None) -> tuple[Ints, Bools]:
        """Token ids and mask. Rust finds the tokens of a span: lists of offsets in Python cost twice as much as all the
        rest here.
        """
        ids = np.array(encoding.ids, dtype=np.int32)
        supervised = np.full(len(ids), spans is None)
        for span in spans or ():
            first, last = _first_covering(encoding, range(*span)), _first_covering(encoding, range(*span)[::-1])
            if first is None or last is None:
                continue
            if ids[first] in self._control_ids and _begin(encoding, first) < span[0]:
                first += 1  # some control tokens take in the whitespace after them, even that of the answer
            while last + 1 < len(ids) and _begin(encoding, last + 1) < span[1]:
                last += 1  # a character may have several tokens
            supervised[first : last + 1] = True
        return ids, supervised

    def _framed(self, ids: Ints, supervised: Bools, spans: Sequence[Span] | None) -> Document:
        """bos + text + eos, where the tokenizer has them and the text does not bring them along."""
        if self._bos is not None and ids[:1] != [self._bos]:
            ids, supervised = np.insert(ids, 0, self._bos), np.insert(supervised, 0, spans is None)
        if self._eos is not None and ids[-1:] != [self._eos]:
            ids, supervised = np.append(ids, np.int32(self._eos)), np.append(supervised, spans is None or bool(spans))
        return Document(ids, supervised)


def _copy(backend: Tokenizer, *, plain: bool) -> Tokenizer:
    """`plain`: control tokens spelled out in a text are plain characters."""
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = plain
    return copy


def _first_covering(encoding: EncodingFast, characters: Iterable[int]) -> int | None:
    """The first token of the first of these characters that has one; a tokenizer may drop whitespace."""
    return next((token for char in characters if (token := encoding.char_to_token(char)) is not None), None)


def _begin(encoding: EncodingFast, token: int) -> int:
    characters = encoding.token_to_chars(token)
    return characters[0] if characters else 0


def _within(spans: Sequence[Span] | None, start: int, end: int) -> list[Span] | None:
    """The parts of the spans that lie in text[start:end], counted from its start; some may be empty."""
    if spans is None:
        return None
    return [(max(first, start) - start, min(last, end) - start) for first, last in spans]
