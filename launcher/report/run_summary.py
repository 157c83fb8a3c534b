"""The summary of a run: what each rank did, what it cost, how the loss went, and whether each claim holds."""

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from launcher.records.run import RankRecord, RunRecord, Sample, Verdict
from launcher.report.figures import extent, literal, on_cpu, whole
from launcher.report.layout import INDENT, heading, indented, page_width, pairs
from launcher.report.rank_table import print_events, print_ranks
from launcher.report.tables import print_elapsed, print_losses, print_memory

PROMPT_SHOWN = 1200  # characters of a sample's text; of a longer one the beginning and the end


def summary(console: Console, run: RunRecord) -> None:
    """Print the whole run. The verdicts and the total stand last: where the eye is when it ends."""
    print_ranks(console, run.ranks)
    print_memory(console, run.ranks, forecast_mib=run.start.forecast_mib)
    print_elapsed(console, run.elapsed_s)
    print_losses(console, run.steps, run.evals)
    print_events(console, run.ranks)
    if run.sample is not None:
        print_sample(console, run.sample)
    print_verdicts(console, run.verdicts)
    console.print()
    print_total(console, run.ranks)
    indented(console, Text.assemble(("run folder ", "dim"), literal(run.start.run_dir)))


def print_sample(console: Console, sample: Sample) -> None:
    heading(console, "Sample", "validation prompt, greedy answer of the trained model")
    rows = [("prompt", sample.prompt, ""), ("expected", sample.expected, ""), ("generated", sample.generated, "bold")]
    console.print(pairs([(Text(label, "cyan"), literal(_shortened(text), style)) for label, text, style in rows]))


def print_verdicts(console: Console, verdicts: Sequence[Verdict]) -> None:
    """A line for each claim. The words PASS and FAIL carry the meaning, colour only repeats it."""
    if not verdicts:
        return
    held = sum(v.holds for v in verdicts)
    heading(console, "Verdicts", f"{held} of {len(verdicts)} hold")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    for verdict in verdicts:
        mark = Text("✓ PASS", "bold green") if verdict.holds else Text("✗ FAIL", "bold white on red")
        grid.add_row(mark, literal(verdict.claim), literal(verdict.evidence, "dim" if verdict.holds else "bold"))
    console.print(Padding(grid, (0, 0, 0, INDENT), expand=False), width=page_width(console))


def print_total(console: Console, ranks: Sequence[RankRecord]) -> None:
    """Compilations, tokens per second of all ranks together, and the highest peak: one line."""
    process = "in this process" if len(ranks) == 1 else "per process"
    memory = "resident" if on_cpu(ranks[0].device) else "VRAM"
    total = Text.assemble(
        (f"{extent([r.compile.compilations for r in ranks])} compilations", "bold"), f" {process} · ",
        (f"{whole(sum(r.tokens_per_s for r in ranks))} tokens/s", "bold"), " · ",
        (f"peak {whole(max(r.vram_peak_mib for r in ranks))} MiB", "bold"), f" {memory}",
    )  # fmt: skip
    indented(console, total)


def _shortened(text: str) -> str:
    text = text.strip("\n")
    if not text:
        return "(nothing)"
    half = PROMPT_SHOWN // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]} … ({left_out:,} characters left out) … {text[-half:]}" if left_out > 0 else text
