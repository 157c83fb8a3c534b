"""mode=preview on the console: the first blocks as they will be trained on, then the data in figures."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from launcher.records.preview import BlockPreview, DocumentPreview, LengthBin, PreviewRecord, TextPart
from launcher.report.figures import counted, extent, literal, whole
from launcher.report.layout import INDENT, Column, heading, indented, page_width, pairs, print_table

SUPERVISED, OTHER, SPECIAL = "green", "dim", "reverse"
BAR_WIDTH = 32  # characters of the longest bar of the histogram
SAID_BETTER = ("documents", "tokens", "supervised_tokens")  # counts that have a line of their own


@dataclass(frozen=True)
class Marks:
    """What stands before and after supervised text and special tokens, and where a line of the data ends.

    `alike`: what could be taken for one of them in the data. It is shown as an escape there.
    """

    supervised: tuple[str, str]
    special: tuple[str, str]
    line_end: str
    alike: re.Pattern[str]

    def text(self, part: TextPart) -> str:
        """What the part says, with its line ends marked, and no mark but these in what is no special token."""
        said = part.text if part.special else self.alike.sub(lambda found: "".join(map(_escape, found[0])), part.text)
        return said.replace("\n", self.line_end + "\n")


def _escape(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"


COLOURED = Marks(("", ""), ("", ""), "↵", re.compile("↵"))
PLAIN = Marks(("«", "»"), ("⟦", "⟧"), "↵", re.compile("[«»⟦⟧↵]"))
PLAIN_ASCII = Marks(  # doubled, or single where a mark may stand beside it
    ("<<", ">>"), ("[[", "]]"), "\\n", re.compile(r"<<+|>>+|\[\[+|]]+|\A[<>\[\]]|[<>\[\]]\Z|\\(?=n)")
)


def preview_page(console: Console, record: PreviewRecord) -> None:
    """Print the whole preview. The figures stand last: where the eye is when it ends."""
    _print_head(console, record)
    if record.blocks:
        marks = _marks(console)
        which = f"the first {len(record.blocks):,} of {record.total_blocks:,} in {record.part}, unshuffled"
        heading(console, "Training blocks", which)
        indented(console, _legend(marks))
        for number, block in enumerate(record.blocks, 1):
            print_block(console, block, number=number, marks=marks)
    _print_figures(console, record)
    _print_lengths(console, record.lengths)
    if record.notes:
        heading(console, "Notes")
        for note in record.notes:
            indented(console, literal(note, "yellow"))


def print_block(console: Console, block: BlockPreview, *, number: int, marks: Marks) -> None:
    """One block: a rule before each document, its text, and the padding summed up."""
    tokens, targets = block.width - block.padding, sum(d.targets for d in block.documents)
    figures = f"{whole(tokens)} of {whole(block.width)} tokens, {whole(targets)} supervised"
    heading(console, f"Block {number:,}", f"{counted(len(block.documents), 'document')}, {figures}")
    for document in block.documents:
        _print_boundary(console, document)
        indented(console, document_text(document.parts, marks))
    if block.padding:
        _print_rule(console, Text(f"{whole(block.padding)} padding", OTHER))


def document_text(parts: Iterable[TextPart], marks: Marks) -> Text:
    """The text of one document with its supervision, special tokens and line ends visible."""
    shown, inside = Text(), False
    for part in parts:
        if part.supervised != inside:
            shown.append(marks.supervised[inside])
            inside = part.supervised
        before, after = marks.special if part.special else ("", "")
        text = literal(before + marks.text(part) + after)
        text.stylize(f"{SUPERVISED if inside else OTHER} {SPECIAL if part.special else ''}")
        shown.append_text(text)
    shown.append(marks.supervised[1] if inside else "")
    if shown.plain.endswith("\n"):
        shown.right_crop(1)  # the line end is marked; the empty line after it is not the data's
    return shown


def _marks(console: Console) -> Marks:
    if console.color_system is not None and not console.no_color:
        return COLOURED
    return PLAIN_ASCII if console.options.ascii_only else PLAIN


def _legend(marks: Marks) -> Text:
    parts = [
        TextPart("supervised: the loss sees it", supervised=True),
        TextPart("  context only  ", supervised=False),
        TextPart("special token", supervised=False, special=True),
    ]
    return document_text(parts, marks).append(f"  {marks.line_end} line end", OTHER)


def _print_head(console: Console, record: PreviewRecord) -> None:
    found = ", ".join(f"{kind} in {counted(rows, 'row')}" for kind, rows in record.loss_on_found.items())
    widths = ", ".join(f"{counted(blocks, 'block')} of {whole(width)}" for width, blocks in record.widths)
    facts = [
        ("model", record.model),
        ("tokenizer", record.tokenizer),
        ("template", record.template),
        ("loss on", f"{record.loss_on} → {found}" if record.loss_on == "auto" else found),
        ("batching", f"{record.batching} · max_length {whole(record.max_length)}"),
        ("blocks", f"{widths} positions"),
    ]
    rows = [(Text(label, "cyan"), literal(value)) for label, value in facts]
    title = Text.assemble("preview of recipe ", literal(record.recipe, "bold"))
    panel = Panel(pairs(rows, indent=0), title=title, title_align="left", border_style="dim cyan", box=box.ROUNDED)
    console.print(panel, width=page_width(console))


def _print_boundary(console: Console, document: DocumentPreview) -> None:
    figures = f"{counted(document.tokens, 'token')}, {whole(document.targets)} supervised"
    _print_rule(console, Text.assemble((f"document {document.number:,}", "cyan"), (f"  {figures}", "dim")))


def _print_rule(console: Console, text: Text) -> None:
    room = max(page_width(console) - INDENT - cell_len(text.plain) - 4, 0)
    line = Text.assemble(" " * INDENT, ("── ", "dim"), text, (" " + "─" * room, "dim"))
    console.print(line, no_wrap=True, overflow="ellipsis")


def _print_figures(console: Console, record: PreviewRecord) -> None:
    heading(console, "Data")
    rows = [*_counts(record.counts, validation=False), *_training(record), *_counts(record.counts, validation=True)]
    rows.append(("validation rows", whole(record.validation_rows), f"in {counted(record.validation_blocks, 'block')}"))
    names, figures, remarks = zip(*rows, strict=True)
    columns = [
        Column("what", [literal(name) for name in names], numeric=False),
        Column("count", [Text(figure) for figure in figures]),
        Column("", [Text(remark, "dim") for remark in remarks], priority=1, numeric=False),
    ]
    print_table(console, columns)


def _counts(counts: dict[str, int], *, validation: bool) -> list[tuple[str, str, str]]:
    kept = [key for key in counts if key not in SAID_BETTER and key.startswith("validation_") is validation]
    kept.sort(key=lambda key: not key.endswith("rows_read"))  # first; the others as they come
    return [(_label(key), whole(counts[key]), "") for key in kept]


def _training(record: PreviewRecord) -> list[tuple[str, str, str]]:
    share = record.supervised_tokens / record.tokens
    return [
        ("training rows", whole(record.train_rows) if record.train_rows else "not known", ""),
        ("documents", whole(record.documents), f"in {record.part}"),
        ("shortest document", whole(record.lengths[0].shortest), "tokens"),
        ("longest document", whole(record.lengths[-1].longest), "tokens"),
        ("tokens", whole(record.tokens), f"in {record.part}"),
        ("supervised tokens", whole(record.supervised_tokens), f"{share * 100:.1f} % of the tokens"),
        ("blocks", whole(record.total_blocks), f"{record.fill * 100:.1f} % filled"),
    ]


def _label(key: str) -> str:
    """ "rows_dropped_no_answer" -> "rows dropped: no answer"."""
    return key.replace("_", " ").replace("dropped ", "dropped: ")


def _print_lengths(console: Console, lengths: tuple[LengthBin, ...]) -> None:
    heading(console, "Lengths", "documents by their tokens")
    most = max(length.documents for length in lengths)
    bars = ["━" * -(-BAR_WIDTH * length.documents // most) for length in lengths]  # rounded up: one document shows
    columns = [
        Column("tokens", [Text(extent([length.shortest, length.longest])) for length in lengths]),
        Column("documents", [Text(whole(length.documents)) for length in lengths]),
        Column("", [Text(bar, "blue") for bar in bars], priority=1, numeric=False),
    ]
    print_table(console, columns)
