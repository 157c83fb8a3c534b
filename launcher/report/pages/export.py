"""mode=export as a page: what was written, how far it is from the trained model, and whether that is near enough."""

from launcher.records.export import ExportRecord
from launcher.report.pages.formatting import whole
from launcher.report.pages.page import Column, Facts, Page, Section, Styled, Table, Value, flagged
from launcher.report.pages.sections import elapsed, note_facts, verdicts

SHOWN = 28  # characters of a prompt or an answer


def export_page(record: ExportRecord) -> Page:
    """What was compared, then the verdicts, last: where the eye is when it ends."""
    return Page(
        title=f"export, format={record.format}" + (f" on={record.on}" if record.on else ""),
        facts=_facts(record),
        sections=[
            elapsed(record.elapsed_s),
            _figures(record),
            _answers(record),
            verdicts(record.verdicts),
            Section("Use it", [Facts(_next(record))]),
        ],
    )


def _facts(record: ExportRecord) -> list[tuple[Value, Value]]:
    size = sum(record.files.values()) / 2**20
    weights = [bytes_ for name, bytes_ in record.files.items() if name.endswith((".safetensors", ".gguf"))]
    largest = max(weights, default=0) / 2**20
    return [
        ("adapter", record.run),
        ("base", record.base),
        ("folder", record.folder),
        (
            "written",
            f"{whole(size)} MiB in {len(record.files)} files, {record.dtype}; the largest {whole(largest)} MiB",
        ),
        ("device", f"{record.device}; the trained model computes in {record.trained_dtype}"),
        ("memory", f"{whole(record.peak_mib)} MiB of host memory at most until it was written"),
        ("stop tokens", ", ".join(record.stop_tokens)),
        *note_facts(record.notes),
    ]


def _figures(record: ExportRecord) -> Section:
    figures, limits = record.figures, record.limits
    rows: list[tuple[str, str, bool, str]] = [
        ("loss, trained", f"{figures.trained_loss:.5f}", True, ""),
        ("loss, written", f"{figures.written_loss:.5f}", True, ""),
        (
            "difference of the losses",
            f"{figures.loss_difference:.1e}",
            figures.loss_difference <= figures.loss_limit(limits),
            f"{figures.loss_limit(limits):.2g}",
        ),
        ("mean KL", f"{figures.mean_kl:.1e}", figures.mean_kl <= limits.kl, f"{limits.kl:g}"),
        ("largest KL", f"{figures.largest_kl:.1e}", True, ""),
        ("logit difference, mean", f"{figures.mean_logit_difference:.1e}", True, ""),
        ("logit difference, largest", f"{figures.largest_logit_difference:.1e}", True, ""),
        ("same likeliest token", f"{figures.agreement:.4f}", True, ""),
        (
            "another, by more than a tie",
            f"{figures.disagreement:.4f}",
            figures.disagreement <= limits.disagreement,
            f"{limits.disagreement:g}",
        ),
    ]
    columns = [
        Column("written beside trained", [name for name, *_ in rows], numeric=False),
        Column("found", [flagged(value, holds) for _, value, holds, _ in rows]),
        Column("limit", [limit for *_, limit in rows]),
    ]
    over = f"{record.data}, {figures.tokens:,} tokens; logits at {figures.positions:,} of them"
    return Section("The written model beside the trained one", [Table(columns)], over)


def _answers(record: ExportRecord) -> Section:
    ends = ["both" if all(a.ended) else "neither" if not any(a.ended) else "one" for a in record.answers]
    columns = [
        Column("prompt", [_short(a.prompt, last=True) for a in record.answers], 1, numeric=False),
        Column("trained", [_short(a.trained) for a in record.answers], 2, numeric=False),
        Column("written", [_short(a.written) for a in record.answers], 3, numeric=False),
        Column("same tokens", [f"{a.agreed} of {a.tokens}" for a in record.answers]),
        Column("ended", ends),
    ]
    return Section("Greedy answers", [Table(columns)], "they may part where two tokens are equally likely")


def _next(record: ExportRecord) -> list[tuple[Value, Value]]:
    if not record.holds:
        return [("kept aside", Styled(record.folder, "bad"))]
    if record.format == "adapter":
        return [("load", f'AutoPeftModelForCausalLM.from_pretrained("{record.folder}")')]
    if record.format == "gguf":
        file = next(name for name in record.files if name.endswith(".gguf"))
        create = f"ollama create {record.folder.rpartition('/')[2]} -f {record.folder}/Modelfile"
        return [("llama.cpp", f"llama-cli -m {record.folder}/{file}"), ("Ollama", create)]
    return [("load", f'AutoModelForCausalLM.from_pretrained("{record.folder}")')]


def _short(text: str, *, last: bool = False) -> str:
    """The beginning of a text on one line, or its end."""
    line = " ".join(text.split())
    if len(line) <= SHOWN:
        return line
    return f"…{line[1 - SHOWN :]}" if last else f"{line[: SHOWN - 1]}…"
