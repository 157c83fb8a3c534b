"""What mode=preview shows: plain frozen records. Stdlib only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextPart:
    """The text of consecutive tokens that are all supervised or all not; or one special token, by its name."""

    text: str  # of the data: unescaped
    supervised: bool  # the loss sees these tokens as targets
    special: bool = False


@dataclass(frozen=True)
class DocumentPreview:
    """One document of a block."""

    number: int  # 1-based, in the order of the sources; a repeated document keeps its number
    tokens: int
    targets: int  # tokens that the loss sees
    parts: tuple[TextPart, ...]


@dataclass(frozen=True)
class BlockPreview:
    """One packed block: its documents in order, then `padding` positions without any."""

    width: int
    documents: tuple[DocumentPreview, ...]
    padding: int


@dataclass(frozen=True)
class LengthBin:
    """How many documents have `shortest` to `longest` tokens, both included."""

    shortest: int
    longest: int
    documents: int


@dataclass(frozen=True)
class PreviewRecord:
    """What would be trained on, without a model: the record of mode=preview."""

    recipe: str  # its name or path
    model: str  # hub id or folder
    tokenizer: str
    template: str  # the chat template in use
    loss_on: str  # as the recipe asks for it
    loss_on_found: dict[str, int]  # rows by what the loss sees of them
    batching: str
    max_length: int
    widths: tuple[tuple[int, int], ...]  # (positions, blocks of this width), ascending
    blocks: tuple[BlockPreview, ...]  # the first of them
    total_blocks: int
    part: str  # what these and the following figures cover: "an epoch", "the first window of the stream"
    train_rows: int  # of the sources; 0 where they are streamed: not known
    documents: int  # a document that a source's weight repeats counts each time
    tokens: int  # padding not counted
    supervised_tokens: int
    fill: float  # 0-1: share of positions that hold a token
    lengths: tuple[LengthBin, ...]  # of the documents, ascending
    validation_rows: int
    validation_blocks: int
    counts: dict[str, int]  # rows read, dropped by reason, cut
    notes: tuple[str, ...] = ()
