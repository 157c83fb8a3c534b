"""What mode=preview shows: plain frozen records. Stdlib only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextPart:
    """Consecutive tokens alike, as text; or one special token, by its name."""

    text: str  # of the data: unescaped
    supervised: bool  # the loss sees these tokens as targets
    special: bool = False


@dataclass(frozen=True)
class DocumentPreview:
    """One document as it lies in a block."""

    number: int  # 1-based, in the order of the sources; a repeated document keeps its number
    tokens: int
    targets: int  # tokens that the loss sees
    parts: tuple[TextPart, ...]


@dataclass(frozen=True)
class BlockPreview:
    """One packed row: its documents in their order, then `padding` positions without any."""

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
    loss_on_found: dict[str, int]  # what that came to: rows by the kind of their targets
    batching: str
    max_length: int
    widths: tuple[tuple[int, int], ...]  # (positions, blocks of this width), ascending
    blocks: tuple[BlockPreview, ...]  # the first of them
    total_blocks: int
    part: str  # what these and the following figures are of: "an epoch", "the first window of the stream"
    train_rows: int  # of the sources; 0: not known, they are streamed
    documents: int  # one that a weight repeats counts each time
    tokens: int  # padding not counted
    supervised_tokens: int
    fill: float  # 0-1: share of positions that hold a token
    lengths: tuple[LengthBin, ...]  # of these documents, ascending
    validation_rows: int
    validation_blocks: int
    counts: dict[str, int]  # rows read, dropped by reason, cut
    notes: tuple[str, ...] = ()
