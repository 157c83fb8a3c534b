"""The page of a run for a browser: what the console shows, with figures first, curves, and the whole recipe."""

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.records.past import UnfinishedRun
from launcher.records.run import RankRecord, RunRecord
from launcher.report.pages import formatting
from launcher.report.pages.curves import charts
from launcher.report.pages.formatting import counted, on_cpu, plain_text, recipe_keys, whole
from launcher.report.pages.page import Column, Facts, Figures, Page, Section, Styled, Table, Value
from launcher.report.pages.run import change, run_page
from launcher.report.pages.start import start_page
from launcher.report.pages.unfinished import ending, unfinished_page

MEMORY_TITLES = ("Resident memory by phase", "VRAM by phase")  # the section of one rank's


def web_page(run: RunRecord | UnfinishedRun) -> Page:
    """The whole run, finished or not."""
    if isinstance(run, UnfinishedRun):
        page = unfinished_page(run)
        first = [Section("", [Figures([("ended", ending(run), "")])]), Section("Summary", [Facts(page.facts)])]
        curves = Section("Curves", charts(run.steps, run.evals, memory="Memory"))
        rest = [Section("Set-up", [Facts(start_page(run.start).facts)] if run.start else [])]
        rest.append(_recipe(run.recipe, run.recipe_origins))
        return Page([*first, curves, *page.sections, *rest], title=page.title)
    sections = {section.title: section for section in run_page(run).sections}
    verdicts, following = sections.pop("Verdicts"), [s for s in (sections.pop("Next", None),) if s]
    memory = "Resident memory" if on_cpu(run.start.device) else "VRAM, allocated"
    return Page(
        [
            Section("", [Figures(_figures(run))]),
            verdicts,
            Section("Curves", charts(run.steps, run.evals, memory=memory)),
            *(
                part
                for s in sections.values()
                for part in ((s, _memory(run.ranks)) if s.title in MEMORY_TITLES else (s,))
            ),
            Section("Set-up", [Facts(start_page(run.start).facts)]),
            _recipe(run.recipe, run.recipe_origins),
            *following,
        ],
        title=f"recipe {run.start.recipe}",
        facts=[(run.start.model, f"{run.start.device} × {run.start.world_size}", counted(run.start.steps, "step"))],
    )


def _figures(run: RunRecord) -> list[tuple[str, Value, str]]:
    held, ranks = sum(verdict.holds for verdict in run.verdicts), run.ranks
    evals, losses = [e.eval_loss for e in run.evals], [s.loss for s in run.steps]
    rows: list[tuple[str, Value, str]] = [
        (name, formatting.loss(values[-1]), change(values[0], values[-1]) if len(values) > 1 else "")
        for name, values in (("eval loss", evals), ("training loss", losses))
        if values
    ]
    if evals and run.eval_adapter is not None and run.eval_adapter != evals[-1]:
        rows.insert(0, ("eval loss of the adapter", formatting.loss(run.eval_adapter), "the best step's"))
    good = held == len(run.verdicts)
    median = f"{max(rank.step_ms_median for rank in ranks):,.1f} ms a step, the median"
    return [
        ("verdicts", Styled(f"{held} of {len(run.verdicts)}", "good" if good else "bad"), "hold"),
        *rows,
        ("tokens/s", whole(sum(rank.tokens_per_s for rank in ranks)), median),
        ("peak memory", f"{whole(max(rank.vram_peak_mib for rank in ranks))} MiB", _device(ranks)),
        ("time", f"{sum(run.elapsed_s.values()):,.0f} s", "from start to end"),
    ]


def _device(ranks: Sequence[RankRecord]) -> str:
    total = f"of {whole(ranks[0].vram[0].total_mib)} MiB" if ranks[0].vram else ""
    return f"resident, {total}" if on_cpu(ranks[0].device) else total


def _memory(ranks: Sequence[RankRecord]) -> Section:
    """Every rank's peak by phase; of one rank the table above has it."""
    phases = Column("phase", [v.phase for v in ranks[0].vram], numeric=False)
    columns = [Column(f"rank {rank.rank}", [whole(v.peak_mib) for v in rank.vram]) for rank in ranks]
    return Section("Peak memory by phase and rank", [Table([phases, *columns])] if len(ranks) > 1 else [], "MiB")


def _recipe(recipe: Mapping[str, Any], origins: Mapping[str, str]) -> Section:
    """Every key as it was resolved, and where its value is from; reports of before do not tell."""
    rest = "default" if origins else ""
    rows = [(key, plain_text(value), origins.get(key, rest)) for key, value in recipe_keys(recipe).items()]
    note = counted(len(rows), "key") + (f", {len(origins)} set" if origins else "")
    return Section("Recipe", [Facts(rows)] if rows else [], note, folded=True)
