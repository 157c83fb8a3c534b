"""mode=preview as a page: the first blocks as they will be trained on, then the data in figures."""

from collections.abc import Iterator

from launcher.records.counts import count_name, ends_in_words, is_of_ends
from launcher.records.preview import BlockPreview, PreviewRecord, TextPart
from launcher.report.pages.formatting import counted, counts, extent, whole
from launcher.report.pages.page import Column, Page, Section, Styled, Table, Tokens, Value
from launcher.report.pages.sections import bars, notes

OWN_ROWS = ("documents", "tokens", "supervised_tokens")  # counts that the table has in rows of their own
LEGEND = [
    TextPart("supervised: the loss sees it", supervised=True),
    TextPart("  context only  ", supervised=False),
    TextPart("special token", supervised=False, special=True),
    TextPart("  line end\n", supervised=False),
]


def preview_page(record: PreviewRecord) -> Page:
    """The whole preview. The figures stand last: where the eye is when it ends."""
    return Page(
        title=f"preview of recipe {record.recipe}",
        facts=_facts(record),
        sections=[*_blocks(record), _data(record), _lengths(record), notes(record.notes)],
    )


def _facts(record: PreviewRecord) -> list[tuple[Value, Value]]:
    loss_on = counts(record.loss_on_found, "row")
    widths = ", ".join(f"{counted(blocks, 'block')} of {whole(width)}" for width, blocks in record.widths)
    ends = ends_in_words(record.counts)
    return [
        ("model", record.model),
        ("tokenizer", record.tokenizer),
        ("template", record.template),
        *([("ends", ends)] if ends else []),
        ("loss on", f"auto → {loss_on}" if record.loss_on == "auto" else loss_on),
        ("batching", f"{record.batching} · max_length {whole(record.max_length)}"),
        ("blocks", f"{widths} positions"),
    ]


def _blocks(record: PreviewRecord) -> Iterator[Section]:
    if record.blocks:
        which = f"the first {len(record.blocks):,} of {record.total_blocks:,} in {record.part}, unshuffled"
        yield Section("Training blocks", [Tokens(LEGEND)], which)
    for number, block in enumerate(record.blocks, 1):
        yield _block(block, number=number)


def _block(block: BlockPreview, *, number: int) -> Section:
    items = [
        Section(
            f"document {document.number:,}",
            [Tokens(document.parts)],
            f"{counted(document.tokens, 'token')}, {whole(document.targets)} supervised",
        )
        for document in block.documents
    ]
    if block.padding:
        items.append(Section(f"{whole(block.padding)} padding", style="dim"))
    tokens, targets = block.width - block.padding, sum(document.targets for document in block.documents)
    figures = f"{whole(tokens)} of {whole(block.width)} tokens, {whole(targets)} supervised"
    return Section(f"Block {number:,}", items, f"{counted(len(block.documents), 'document')}, {figures}")


def _data(record: PreviewRecord) -> Section:
    supervised = 100 * record.supervised_tokens / record.tokens
    rows = [
        *_counts(record, validation=False),
        ("training rows", whole(record.train_rows) if record.train_rows else "not known", ""),
        ("documents", whole(record.documents), f"in {record.part}"),
        ("shortest document", whole(record.lengths[0].shortest), "tokens"),
        ("longest document", whole(record.lengths[-1].longest), "tokens"),
        ("tokens", whole(record.tokens), f"in {record.part}"),
        ("supervised tokens", whole(record.supervised_tokens), f"{supervised:.1f} % of the tokens"),
        ("blocks", whole(record.total_blocks), f"{record.fill * 100:.1f} % filled"),
        *_counts(record, validation=True),
        ("validation rows", whole(record.validation_rows), f"in {counted(record.validation_blocks, 'block')}"),
    ]
    names, figures, remarks = zip(*rows, strict=True)
    columns = [
        Column("what", names, numeric=False),
        Column("count", figures),
        Column("", [Styled(remark, "dim") for remark in remarks], priority=1, numeric=False),
    ]
    return Section("Data", [Table(columns)])


def _counts(record: PreviewRecord, *, validation: bool) -> list[tuple[str, str, str]]:
    """What happened to the rows, rows read first. Unused keys are left to the notes, ends to the facts."""
    keys = [key for key in record.counts if key not in OWN_ROWS and key.startswith("validation_") is validation]
    keys = [key for key in keys if "_key_" not in key and not is_of_ends(key)]
    keys.sort(key=lambda key: not key.endswith("rows_read"))
    return [(count_name(key), whole(record.counts[key]), "") for key in keys]


def _lengths(record: PreviewRecord) -> Section:
    bins = record.lengths
    columns = [
        Column("tokens", [extent([b.shortest, b.longest]) for b in bins]),
        Column("documents", [whole(b.documents) for b in bins]),
        Column("", bars([b.documents for b in bins]), priority=1, numeric=False),
    ]
    return Section("Lengths", [Table(columns)], "documents by their tokens")
