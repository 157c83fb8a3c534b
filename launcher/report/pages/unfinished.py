"""A run that did not come to its end: how far it came, how it ended, and whether it can go on. Or one that did, and
whose report.json is missing."""

import shlex

from launcher.records.past import UnfinishedRun
from launcher.report.pages.explanations import explanations
from launcher.report.pages.formatting import counted
from launcher.report.pages.page import Page, Styled, Value
from launcher.report.pages.run import loss_section, parts_section
from launcher.report.pages.sections import notes


def unfinished_page(run: UnfinishedRun) -> Page:
    """What metrics.jsonl and status.json tell."""
    facts: list[tuple[Value, ...]] = [
        ("run folder", run.folder),
        ("ended", ending(run)),
        ("last step", f"{run.steps[-1].step:,}" if run.steps else "none"),
        ("time in steps", f"{sum(step.step_s for step in run.steps):,.1f} s"),
        ("checkpoints", ", ".join(f"step {step:,}" for step in run.checkpoints) or "none"),
        ("report.json", Styled("missing: what only it holds is not shown", "bad"))
        if _done(run)
        else ("goes on", _resume(run)),
    ]
    given = [(run.ending.rank, run.ending.explanations)] if run.ending else []
    sections = [loss_section(run.steps, run.evals), explanations(given), parts_section(run.parts), notes(run.notes)]
    return Page(sections, title="finished run without its report" if _done(run) else "unfinished run", facts=facts)


def ending(run: UnfinishedRun) -> Value:
    """How the run ended, as far as that was written."""
    if run.in_use:
        return Styled("not yet: a process has the folder", "good")
    if run.ending is None:
        return Styled("without a word: it was killed, or its machine stopped", "bad")
    if _done(run):
        return Styled(f"code 0: {run.ending.reason}", "good")
    reason = run.ending.reason.splitlines()[0] if run.ending.explanations else run.ending.reason
    return Styled(f"code {run.ending.code}, rank {run.ending.rank}: {reason}", "bad")


def _done(run: UnfinishedRun) -> bool:
    """Whether the run came to its end, with code 0, and has lost its report."""
    return not run.in_use and run.ending is not None and run.ending.code == 0


def _resume(run: UnfinishedRun) -> str:
    if run.in_use:
        return "by itself"
    if not run.checkpoints:
        return "no: it has no checkpoint; the same command starts anew"
    again = f"its command again, with run.output_dir={shlex.quote(run.folder)}"
    return f"yes, from step {run.checkpoints[-1]:,} ({counted(len(run.checkpoints), 'checkpoint')}): {again}"
