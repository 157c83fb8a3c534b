"""mode=parity as a page: what was compared, by batch and by adapter, and whether the gate is open."""

from launcher.records.parity import ParityRecord
from launcher.report.pages.explanations import explanations
from launcher.report.pages.formatting import counted, loss, whole
from launcher.report.pages.page import Column, Page, Section, Styled, Table, Value, flagged
from launcher.report.pages.sections import elapsed, model_facts, note_facts, notes, sample_note, sampled, verdicts

BATCHES_SHOWN = 16  # rows of the table; more batches are sampled, first and last included
SAME = "the same batches, adapters and seeds; the weights are not updated between batches"


def parity_page(record: ParityRecord) -> Page:
    """The whole comparison. The verdicts stand last: where the eye is when it ends."""
    return Page(
        title=f"parity of recipe {record.start.recipe}",
        facts=_facts(record),
        sections=[
            elapsed(record.elapsed_s),
            _batches(record),
            _adapters(record),
            _errors(record),
            explanations([(0, record.compile.explanations)]),
            notes(record.notes),
            verdicts(record.verdicts),
        ],
    )


def _facts(record: ParityRecord) -> list[tuple[Value, Value]]:
    start, compiled = record.start, record.compile
    widths = ", ".join(map(whole, start.widths))
    graphs = f"{counted(compiled.planned_graphs, 'graph')} of {compiled.expected_graphs} planned"
    autocast = "" if start.dtype == "float32" else f", autocast to {start.dtype}"
    return [
        *model_facts(start),
        ("compiled", f"{start.compile} · attention {start.attention} · {graphs} · CUDA graphs {start.cuda_graphs}"),
        ("eager", f"stock transformers, PEFT and bitsandbytes{autocast}"),
        ("reference", "the same stock modules in float32, on the dequantised base"),
        ("batches", f"{len(record.batches)} of {start.micro_batch} × {widths} × accumulation {start.accumulation}"),
        ("shared", SAME),
        *note_facts(start.notes),
    ]


def _batches(record: ParityRecord) -> Section:
    batches, gate = sampled(record.batches, BATCHES_SHOWN), record.gate
    columns = [
        Column("batch", [f"{b.batch:,}" for b in batches]),
        Column("supervised\ntokens", [whole(b.supervised_tokens) for b in batches], 3),
        Column("compiled\nloss", [loss(b.loss.compiled) for b in batches]),
        Column("eager\nloss", [loss(b.loss.eager) for b in batches]),
        Column("fp32\nloss", [loss(b.reference_loss) for b in batches]),
        Column(
            "compiled\nto eager",
            [flagged(f"{b.loss_difference:.1e}", b.loss_difference <= gate.loss) for b in batches],
        ),
        Column("least\ncosine", [flagged(f"{b.least_cosine:.5f}", b.holds) for b in batches], 1),
        Column("loss error\ncompiled", [f"{b.loss_error.compiled:.1e}" for b in batches], 2),
        Column("\neager", [f"{b.loss_error.eager:.1e}" for b in batches], 2),
        Column("gradient error\ncompiled", [f"{b.gradient_error.compiled:.1e}" for b in batches], 1),
        Column("\neager", [f"{b.gradient_error.eager:.1e}" for b in batches], 1),
    ]
    shown = sample_note(len(batches), len(record.batches), "batches")
    return Section("Batches", [Table(columns)], f"mean loss of a token; errors are against fp32{shown}")


def _adapters(record: ParityRecord) -> Section:
    adapters = record.adapters
    by_kind = {length.of: length for length in record.lengths}
    lengths = [by_kind[f"{a.kind} {a.matrix}"] for a in adapters]
    columns = [
        Column("adapter", [f"{a.kind} {a.matrix}" for a in adapters], numeric=False),
        Column("modules", [whole(a.modules) for a in adapters], 2),
        Column("cosine\ncompiled, eager", [flagged(f"{a.least_cosine:.5f}", a.holds) for a in adapters]),
        Column("where", [Styled(a.where, "dim") for a in adapters], 1, numeric=False),
        Column("norm difference\ncompiled, eager", [f"{a.norm_difference:.1e}" for a in adapters], 2),
        Column("length\ncompiled", [flagged(f"{a.compiled:.4f}", abs(a.compiled - 1) <= a.limit) for a in lengths]),
        Column("\neager", [f"{a.eager:.4f}" for a in lengths], 1),
        Column("\n1 ±", [f"{a.limit:.1e}" for a in lengths], 1),
        Column("cosine\neager, fp32", [f"{a.eager_cosine:.5f}" for a in adapters], 2),
    ]
    return Section(
        "Adapter gradients",
        [Table(columns)],
        "of each kind the worst module and batch; lengths along fp32's, over all of them",
    )


def _errors(record: ParityRecord) -> Section:
    errors = record.loss_error, record.gradient_error
    columns = [
        Column("of the", ["loss", "gradient, all adapters"], numeric=False),
        Column("compiled", [f"{error.compiled:.2e}" for error in errors]),
        Column("eager", [f"{error.eager:.2e}" for error in errors]),
        Column("ratio", [f"{error.compiled / error.eager:.2f}" if error.eager else "-" for error in errors]),
    ]
    return Section("Error against fp32", [Table(columns)], "means over the batches")
