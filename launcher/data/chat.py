"""Rows become token ids with a mask of what the loss sees.

A chat is rendered by the tokenizer's own template and tokenised once, with offsets. Which characters are the
assistant's is found by rendering beginnings of the conversation; the turn's end token belongs to the span (and what the
template writes after it, a newline in ChatML):

    prefix = render(messages[:i], generation prompt)     <bos>[user]Hi[end][assistant]
    upto   = render(messages[: i + 1])                   <bos>[user]Hi[end][assistant]Hello.[end]
    full   = render(messages)                            <bos>[user]Hi[end][assistant]Hello.[end][user]Bye[end]
    span   = what upto adds to prefix                                              Hello.[end]

This holds where each is a beginning of the next. A template that rewrites earlier turns cannot be masked so: an error.

A chat whose messages spell out a control token ("<|eot_id|>") must not end its own turn. Such strings are rendered as
stand-ins, private-use characters of the same length, and tokenised as plain characters afterwards; only these rows pay
for it. Plain text is different: there control tokens are kept, since text rendered beforehand is a usual source.
"""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from launcher.data.formats import Conversation, Message, Row, RowFault, Text
from launcher.data.packing import Document
from launcher.errors import DataError
from launcher.recipe.schema import DataSection

_CHUNK = 1024  # rows rendered and tokenised at once; a chat that the template refuses has its chunk rendered one by one
_STAND_INS = "[\U00100000-\U0010fffd]"  # Unicode's last private-use plane

Chat = list[dict[str, str]]
Span = tuple[int, int]  # half-open range of characters


@dataclass(frozen=True)
class _Veiled:
    """A conversation as the template gets it; `literals` tells what its stand-in characters hide."""

    row: Conversation
    chat: Chat
    literals: dict[str, str]

    @property
    def turns(self) -> list[int]:
        """The assistant's messages that say something: those to supervise."""
        return [i for i, m in enumerate(self.chat) if m["role"] == "assistant" and m["content"].strip()]


@dataclass(frozen=True)
class _Rendered:
    """A row as text; the loss sees the characters of `spans`."""

    row: Row
    text: str
    spans: list[Span]
    literals: dict[str, str]


class Encoder:
    """Turns rows into documents under data.loss_on and data.bad_rows. Raises DataError for a slow tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, data: DataSection) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise DataError(
                "Masking needs a fast tokenizer: one that says which characters a token covers.\n"
                f"Found: {type(tokenizer).__name__}.\nUse a model whose folder holds a tokenizer.json."
            )
        self._tokenizer = tokenizer
        self._data = data
        # Called directly: the tokenizer around it halves the speed, and sets all that is set here anew when called.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        control = [re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._control = re.compile("|".join([*control, _STAND_INS]))

    def encode(self, rows: Sequence[Row], *, counts: Counter[str]) -> list[tuple[Row, Document]]:
        """The rows that can be rendered, each with its whole document; refused ones count as `rows_dropped_template`.

        Raises DataError: no chat template, one that cannot be masked, a chat it refuses, loss_on=assistant for text.
        """
        self._check(rows)
        encoded: list[tuple[Row, Document]] = []
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            rendered = self._render([self._veil(row) for row in chunk if isinstance(row, Conversation)], counts)
            rendered += [_Rendered(row, row.text, [(0, len(row.text))], {}) for row in chunk if isinstance(row, Text)]
            documents = self._tokenise(rendered)
            encoded += [(item.row, document) for item, document in zip(rendered, documents, strict=True)]
        return encoded

    def prompt(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """The conversation so far with the generation prompt behind it, as text and as token ids."""
        veiled = self._veil(Conversation(tuple(messages), where=""))
        text = self._apply([veiled.chat], prompt=True)[0]
        [document] = self._tokenise([_Rendered(veiled.row, text, [], veiled.literals)])
        return "".join(piece for piece, _ in _pieces(text, veiled.literals)), document.input_ids

    def _check(self, rows: Sequence[Row]) -> None:
        text = next((row for row in rows if isinstance(row, Text)), None)
        if text and self._data.loss_on == "assistant":
            raise DataError(
                f"{text.where}: data.loss_on=assistant needs chats.\nFound: plain text, which has no assistant.\n"
                "Set data.loss_on=auto (assistant for chats, all for text), or give messages."
            )
        if any(isinstance(row, Conversation) for row in rows) and not self._tokenizer.chat_template:
            raise DataError(
                "Rows of messages need a tokenizer with a chat template.\n"
                f"Found: none in {self._tokenizer.name_or_path or 'this tokenizer'}.\n"
                'Use an instruct model, or give the rows as {"text": "..."}.'
            )

    def _veil(self, row: Conversation) -> _Veiled:
        """Control-token strings in messages become stand-ins of their length; so does what looks like a stand-in."""
        chat = [{"role": m.role, "content": m.content} for m in row.messages]
        found = sorted({literal for m in row.messages for literal in self._control.findall(m.content)})
        stand_in = {literal: chr(0x100000 + index) for index, literal in enumerate(found)}
        if found:
            for message in chat:
                message["content"] = self._control.sub(lambda m: stand_in[m[0]] * len(m[0]), message["content"])
        return _Veiled(row, chat, {char: literal for literal, char in stand_in.items()})

    def _apply(self, chats: list[Chat], *, prompt: bool) -> list[str]:
        if not chats:
            return []
        return cast(list[str], self._tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=prompt))

    def _render(self, chats: Sequence[_Veiled], counts: Counter[str]) -> list[_Rendered]:
        try:
            return self._render_all(chats) if self._data.loss_on == "all" else self._render_masked(chats)
        except DataError:
            raise
        except Exception as error:  # a template is a program of its own: whatever it raises is about a row
            if len(chats) > 1:
                return [item for chat in chats for item in self._render([chat], counts)]
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            rule = "the tokenizer's chat template must accept the conversation."
            fault = RowFault("template", where=chats[0].row.where, rule=rule, found=found)
            if self._data.bad_rows == "raise":
                raise fault from error
            counts[f"rows_dropped_{fault.reason}"] += 1
            return []

    def _render_all(self, chats: Sequence[_Veiled]) -> list[_Rendered]:
        texts = self._apply([veiled.chat for veiled in chats], prompt=False)
        return [_Rendered(v.row, text, [(0, len(text))], v.literals) for v, text in zip(chats, texts, strict=True)]

    def _render_masked(self, chats: Sequence[_Veiled]) -> list[_Rendered]:
        fulls = iter(self._apply([v.chat for v in chats], prompt=False))
        prefixes = iter(self._apply([v.chat[:turn] for v in chats for turn in v.turns], prompt=True))
        inner = [v.chat[: turn + 1] for v in chats for turn in v.turns if turn + 1 < len(v.chat)]
        uptos = iter(self._apply(inner, prompt=False))
        rendered = []
        for veiled, full in zip(chats, fulls, strict=True):
            spans = []
            for turn in veiled.turns:
                prefix, upto = next(prefixes), next(uptos) if turn + 1 < len(veiled.chat) else full
                if not (upto.startswith(prefix) and full.startswith(upto)):
                    raise _unmaskable(veiled.row.where, turn)
                spans.append((len(prefix), len(upto)))
            rendered.append(_Rendered(veiled.row, full, spans, veiled.literals))
        return rendered

    def _tokenise(self, rendered: Sequence[_Rendered]) -> Iterator[Document]:
        encodings = iter(self._encode([item.text for item in rendered if not item.literals], literal=False))
        for item in rendered:
            ids, offsets = self._encode_veiled(item) if item.literals else next(encodings)
            if isinstance(item.row, Text):
                yield self._text_document(ids)
            else:
                yield Document(ids, _supervised(offsets, item.spans))

    def _encode(self, texts: list[str], *, literal: bool) -> list[tuple[list[int], list[Span]]]:
        """Ids, and the characters that each covers. `literal`: control-token strings are plain characters."""
        self._backend.encode_special_tokens = literal
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def _encode_veiled(self, item: _Rendered) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        offsets: list[Span] = []
        at = 0
        for piece, literal in _pieces(item.text, item.literals):
            [(piece_ids, piece_offsets)] = self._encode([piece], literal=literal)
            ids += piece_ids
            offsets += [(start + at, end + at) for start, end in piece_offsets]
            at += len(piece)
        return ids, offsets

    def _text_document(self, ids: list[int]) -> Document:
        """bos + text + eos, where the tokenizer has them and the text does not bring them along; all supervised."""
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        before = [] if bos is None or ids[:1] == [bos] else [bos]
        after = [] if eos is None or ids[-1:] == [eos] else [eos]
        whole = [*before, *ids, *after]
        return Document(whole, [True] * len(whole))


def _supervised(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Tokens that cover at least one character of a span, or stand inside one with an empty range of their own."""
    supervised = [False] * len(offsets)
    for start, end in spans:
        first = bisect_left(offsets, start, key=lambda o: max(o[0], o[1] - 1))
        last = bisect_left(offsets, end, key=lambda o: o[0])
        supervised[first:last] = [True] * (last - first)
    return supervised


def _pieces(text: str, literals: dict[str, str]) -> Iterator[tuple[str, bool]]:
    """The text as it reads without stand-ins, cut where they stood: (piece, whether it is one of `literals`)."""
    at = 0
    for match in re.finditer(_STAND_INS, text) if literals else ():
        if match.start() >= at:  # a stand-in is as many equal characters as its literal is long
            if match.start() > at:
                yield text[at : match.start()], False
            literal = literals[match[0]]
            yield literal, True
            at = match.start() + len(literal)
    if text[at:]:
        yield text[at:], False


def _unmaskable(where: str, turn: int) -> DataError:
    return DataError(
        f"{where}: to mask all but the assistant, the chat template must write a turn the same whatever follows it.\n"
        f"Found: message {turn + 1} is rendered differently without what comes after it.\n"
        "Set data.loss_on=all, which needs no mask, or use a model with another chat template."
    )
