"""Rows become token ids with a mask of what the loss sees: the one door to templates, spans and tokenising.

Control-token strings in a message are plain characters. In plain text they are control tokens, since text rendered
beforehand is a usual source.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from transformers import PreTrainedTokenizerBase

from launcher.data.chat.named_templates import fitting_templates, put_template
from launcher.data.chat.render import Rendered, Renderer
from launcher.data.chat.tokenizing import Tokeniser
from launcher.data.documents import Document
from launcher.data.read.rows import Conversation, Message, Row, RowFault, Text
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection

CHUNK = 512  # rows rendered and tokenised at once: each time costs the tokeniser's threads a start
CHUNK_CHARACTERS = 1 << 20  # or fewer rows that have so many: a token takes a hundred bytes before it is an id
_AHEAD = 2  # chunks waiting to be tokenised


class Encoder:
    """Turns rows into documents under data.template and data.loss_on.

    `template` says whose template chats are rendered with: "the tokenizer's own", a name of data.template, or "none".
    A named one is put on the tokenizer, so that it is saved with it.

    Raises DataError: a slow tokenizer, or one without the control tokens of data.template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, data: DataSection) -> None:
        self._tokeniser = Tokeniser(tokenizer)
        self._tokenizer = tokenizer
        self._data = data
        if data.template != "auto":
            put_template(tokenizer, data.template)
            self.template: str = data.template
        else:
            self.template = "the tokenizer's own" if tokenizer.chat_template else "none"
        self._renderer = Renderer(tokenizer, name=self.template)

    def encode(self, rows: Iterable[Row]) -> list[Document | RowFault]:
        """Each row's whole document, in order; in the place of a chat that the template refuses or
        cannot mask, the fault.

        Raises DataError for what is wrong with all rows: no chat template, a data.loss_on that does not fit.
        """
        return [item for _, item in self.encoded(rows)]

    def encoded(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Document | RowFault]]:
        """Each row with what `encode` gives for it; some thousand rows are read ahead. Raises what `encode` does."""
        pending: deque[tuple[list[Row], Future[list[Document | RowFault]]]] = deque()
        # Tokenising runs outside the interpreter's lock: one chunk is tokenised while the next is read and rendered.
        with ThreadPoolExecutor(1) as pool:
            for chunk in chunks(rows):
                pending.append((chunk, pool.submit(self._tokenise, self._render(chunk))))
                if len(pending) > _AHEAD:
                    yield from _documents(*pending.popleft())
            while pending:
                yield from _documents(*pending.popleft())

    def prompt(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """The conversation so far with the generation prompt behind it, as text and as token ids.

        Raises DataError: no chat template, or it refuses the conversation.
        """
        row = Conversation(tuple(messages), where="the prompt")
        self._check_template(row)
        rendered = self._renderer.prompt(row)
        [document] = self._tokeniser.documents([rendered])
        return "".join(piece for piece, _ in rendered.pieces()), document.input_ids.tolist()

    def loss_on(self, row: Row) -> str:
        """What of the row the loss sees: assistant, completion or all. Raises DataError if data.loss_on has no meaning
        for it.
        """
        choice = self._data.loss_on
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

    def _check_template(self, row: Conversation) -> None:
        if self._tokenizer.chat_template:
            return
        fitting = " or ".join(fitting_templates(self._tokenizer))
        remedy = f"Set data.template={fitting}, use" if fitting else "No template of data.template fits it: use"
        raise DataError(
            f"{row.where}: rows of messages need a tokenizer with a chat template, or data.template.\n"
            f"Found: none in {self._tokenizer.name_or_path or 'this tokenizer'}, and data.template=auto.\n"
            f'{remedy} an instruct model, or give the rows as {{"text": "..."}}.'
        )

    def _render(self, rows: Sequence[Row]) -> list[Rendered | RowFault]:
        losses = [self.loss_on(row) for row in rows]
        chats = [(row, loss) for row, loss in zip(rows, losses, strict=True) if isinstance(row, Conversation)]
        if chats:
            self._check_template(chats[0][0])
        rendered = iter(self._renderer.render([row for row, _ in chats], [loss for _, loss in chats]))
        return [
            _render_text(row, loss) if isinstance(row, Text) else next(rendered)
            for row, loss in zip(rows, losses, strict=True)
        ]

    def _tokenise(self, rendered: Sequence[Rendered | RowFault]) -> list[Document | RowFault]:
        documents = iter(self._tokeniser.documents([item for item in rendered if isinstance(item, Rendered)]))
        return [item if isinstance(item, RowFault) else next(documents) for item in rendered]


def chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in order, together until they are CHUNK or have CHUNK_CHARACTERS."""
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        texts = [row.text] if isinstance(row, Text) else [message.content for message in row.messages]
        characters += sum(map(len, texts))
        if len(chunk) == CHUNK or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _documents(
    rows: Sequence[Row], made: Future[list[Document | RowFault]]
) -> Iterator[tuple[Row, Document | RowFault]]:
    return zip(rows, made.result(), strict=True)


def _render_text(row: Text, loss: str) -> Rendered:
    """A completion that says nothing trains nothing, as an assistant's turn."""
    if loss == "all":
        return Rendered(row.text, None, {}, framed=True)
    said = row.text[row.answer :].strip()
    return Rendered(row.text, [(row.answer or 0, len(row.text))] if said else [], {}, framed=True)
