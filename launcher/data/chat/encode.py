"""Rows become documents: token ids, with a mask of the tokens that the loss sees.

    row -> what of it the loss sees -> text with spans of characters (render.py) -> token ids and mask

A token is supervised if it covers a character of a span. Control tokens spelled out in a message are plain characters
(spelled_out.py). In plain text they are control tokens, since text rendered beforehand is a usual source. Token ids
stay as they are.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import EncodingFast

from launcher.data.chat.named_templates import control_tokens, fitting_templates, put_template
from launcher.data.chat.render import ENDLESS, ChatRenderer, Rendered, render_text
from launcher.data.chat.spelled_out import SpelledOut, copy_of
from launcher.data.chat.turns import Span
from launcher.data.documents import Bools, Document, Ints
from launcher.data.read.rows import Conversation, Message, PlainText, Row, RowFault, TokenIds
from launcher.errors import DataError, RecipeError
from launcher.recipe.data_section import DataSection
from launcher.records.counts import closed_key


class EncodedRow(NamedTuple):
    """What the loss sees of a row ("assistant", "last", "completion", "labels" or "all"), and the row's tokens, however
    many; or why there are none.
    """

    loss_on: str
    document: Document | RowFault


def resolve_loss_on(row: Row, choice: str) -> str:
    """What the loss sees of this row under data.loss_on: assistant, last, completion, all; of token ids: their labels.

    Raises DataError if the choice has no meaning for the row.
    """
    if isinstance(row, TokenIds):
        return _loss_on_ids(row, choice)
    if choice == "auto":
        plain = "assistant" if isinstance(row, Conversation) else "all"
        return plain if row.answer is None else "completion"
    if isinstance(row, PlainText) and (
        choice in ("assistant", "last") or (choice == "completion" and row.answer is None)
    ):
        need, lack = ("chats", "assistant") if choice != "completion" else ("prompts and completions", "completion")
        raise DataError(
            f"{row.where}: data.loss_on={choice} needs {need}.\nFound: plain text, which has no {lack}.\n"
            "Set data.loss_on=auto (assistant for chats, completion after prompts, all for text)."
        )
    return choice


def _loss_on_ids(row: TokenIds, choice: str) -> str:
    if choice not in ("auto", "all"):
        raise DataError(
            f"{row.where}: data.loss_on={choice} needs chats, or prompts and completions.\n"
            "Found: token ids, of which labels say what is learned.\n"
            "Set data.loss_on=auto (the labels, or all tokens where there are none)."
        )
    return "all" if choice == "all" or row.supervised is None else "labels"


class Encoder:
    """Turns rows into documents under data.template and data.loss_on, in this process.

    `template` says whose template renders chats: "the tokenizer's own", a name of data.template, or "none". A named one
    is put on the tokenizer, so that it is saved with it. `stop_ids`: where the model stops beside its eos_token.

    Raises DataError: a slow tokenizer, or one without the control tokens of data.template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, data: DataSection, stop_ids: Sequence[int] = ()) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise DataError(
                "Masking needs a fast tokenizer: one that says which characters a token covers.\n"
                f"Found: {type(tokenizer).__name__}.\nUse a model whose folder holds a tokenizer.json."
            )
        self.tokenizer, self.data, self.stop_ids = tokenizer, data, tuple(stop_ids)
        self.template: str = data.template
        if data.template == "auto":
            self.template = "the tokenizer's own" if tokenizer.chat_template else "none"
        else:
            put_template(tokenizer, data.template)
        self._spelled_out = SpelledOut(tokenizer)
        options: dict[str, Any] = {"spelled_out": self._spelled_out, "stop_ids": self.stop_ids}
        self._renderer = ChatRenderer(tokenizer, name=self.template, **options)
        self._with_tools = self._renderer
        if isinstance(tokenizer.chat_template, dict) and "tool_use" in tokenizer.chat_template:
            name = f"{self.template}, tool_use"
            self._with_tools = ChatRenderer(tokenizer, name=name, variant="tool_use", **options)
        # The backend is called directly: the tokenizer around it halves the speed, and changes it at every call.
        self._backend = copy_of(tokenizer.backend_tokenizer)
        self._control_ids = control_tokens(tokenizer).keys()

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow]:
        """Every row's document, in order, or the RowFault of a chat that the template refuses or cannot mask, or of ids
        that the tokenizer lacks.

        Raises DataError for what is wrong with all rows: no chat template, a data.loss_on that does not fit.
        """
        losses = [resolve_loss_on(row, self.data.loss_on) for row in rows]
        rendered = [self._render(row, loss_on) for row, loss_on in zip(rows, losses, strict=True)]
        documents = self._tokenise(rendered)
        return [EncodedRow(loss_on, document) for loss_on, document in zip(losses, documents, strict=True)]

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> tuple[str, list[int]]:
        """The conversation so far and the generation prompt, as text and as token ids; `tools`: as of Conversation.

        Raises DataError: no chat template, or it refuses the conversation.
        """
        row = Conversation(tuple(messages), where="the prompt", tools=tuple(tools))
        self._check_template(row)
        rendered = self._renderer_of(row).render_prompt(row)
        [document] = self._tokenise([rendered])
        assert isinstance(document, Document)
        return rendered.shown, document.input_ids.tolist()

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

    @cached_property
    def _known_ids(self) -> int:
        """One more than the largest id of the tokenizer."""
        return 1 + max(self.tokenizer.get_vocab().values(), default=-1)

    def _as_they_are(self, row: TokenIds, loss_on: str) -> Document | RowFault:
        if len(unknown := row.input_ids[row.input_ids >= self._known_ids]):
            rule = f"token ids are those of the model's tokenizer, which has {self._known_ids:,}."
            remedy = "Prepare them with this tokenizer, or set data.bad_rows=skip to drop such rows and count them."
            return RowFault("token_ids", where=row.where, rule=rule, found=f"the id {unknown[0]}", remedy=remedy)
        everything = np.ones(len(row.input_ids), np.bool_)
        return Document(row.input_ids, everything if loss_on == "all" or row.supervised is None else row.supervised)

    def _render(self, row: Row, loss_on: str) -> Rendered | Document | RowFault:
        if isinstance(row, TokenIds):
            return self._as_they_are(row, loss_on)
        if isinstance(row, PlainText):
            return render_text(row, loss_on)
        self._check_template(row)
        try:
            return self._renderer_of(row).render(row, loss_on)
        except RowFault as fault:
            return fault

    def _renderer_of(self, row: Conversation) -> ChatRenderer:
        return self._with_tools if row.tools else self._renderer

    def _tokenise(self, rendered: Sequence[Rendered | Document | RowFault]) -> list[Document | RowFault]:
        texts = [item.text for item in rendered if isinstance(item, Rendered) and not item.stand_ins]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return [self._document(item, encodings) if isinstance(item, Rendered) else item for item in rendered]

    def _document(self, item: Rendered, encodings: Iterator[EncodingFast]) -> Document:
        if item.stand_ins:
            encoding, ids = self._spelled_out.encode(item.text, item.stand_ins)
        else:
            encoding = next(encodings)
            ids = np.array(encoding.ids, dtype=np.int32)
        document = Document(ids, self._supervised(encoding, ids, item.spans), item.remarks, item.ends)
        return self._framed(document, item) if item.framed else document

    def _supervised(self, encoding: EncodingFast, ids: Ints, spans: Sequence[Span] | None) -> Bools:
        """The mask. Rust finds the tokens of a span: lists of offsets in Python cost twice as much as all the rest."""
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
        return supervised

    def _framed(self, document: Document, item: Rendered) -> Document:
        """bos + text + eos, where the tokenizer has them and the text does not bring them along, within whitespace."""
        ids, supervised, spans = document.input_ids, document.supervised, item.spans
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        if bos is not None and not item.text.lstrip().startswith(bos):
            ids, supervised = np.insert(ids, 0, self.tokenizer.bos_token_id), np.insert(supervised, 0, spans is None)
        rule = "text"
        if eos is not None and not item.text.rstrip().endswith(eos):
            rule, ids = "completion", np.append(ids, np.int32(self.tokenizer.eos_token_id))
            supervised = np.append(supervised, spans is None or bool(spans))
        ends = (closed_key(rule, eos),) if spans and eos is not None else ()  # of a completion
        return Document(ids, supervised, () if eos is not None or spans == [] else (ENDLESS,), ends)


def _first_covering(encoding: EncodingFast, characters: Iterable[int]) -> int | None:
    """The first token of the first of these characters that has one; a tokenizer may drop whitespace."""
    return next((token for char in characters if (token := encoding.char_to_token(char)) is not None), None)


def _begin(encoding: EncodingFast, token: int) -> int:
    characters = encoding.token_to_chars(token)
    return characters[0] if characters else 0
