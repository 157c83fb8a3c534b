"""mode=compare: finished runs side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from launcher.checkpoint.files import write_json
from launcher.commands.finished_run import Invocation
from launcher.commands.past_run import read_run
from launcher.errors import RecipeError
from launcher.recipe.run_options import CompareOptions
from launcher.records.past import ComparisonRecord
from launcher.records.run import RunRecord
from launcher.report.pages.formatting import recipe_keys
from launcher.report.pages.sections import sampled
from launcher.report.render import print_record

LOSSES_KEPT = 200  # steps of a comparison's record
OWN = ("run.output_dir", "recipe", "run_dir", "notes")  # each run has its own
SHOWN_BELOW = ("optimizer", "steps")  # of the start, that keys or figures show


def compare_runs(options: CompareOptions, invocation: Invocation) -> None:
    """Print how the runs differ; with report=PATH write it too. Raises RecipeError where one has not ended well."""
    runs = [read_run(path) for path in options.runs]
    finished = [run for run in runs if isinstance(run, RunRecord)]
    if len(finished) < len(runs):
        path = next(path for path, run in zip(options.runs, runs, strict=True) if run not in finished)
        raise RecipeError(f"runs must have come to their end; {path} has not.\nLook at it: mode=report run={path}")
    record = comparison(finished)
    print_record(invocation.console, record)
    if invocation.report:
        write_json(invocation.report, record.as_report())


def comparison(runs: Sequence[RunRecord]) -> ComparisonRecord:
    """What differs between the runs, and what each has reached at what cost."""
    recipes = [recipe_keys(run.recipe) for run in runs]
    claims = [{verdict.claim: verdict.holds for verdict in run.verdicts} for run in runs]
    start = _differences([_found(run) for run in runs])
    return ComparisonRecord(
        runs=tuple(run.start.run_dir for run in runs),
        recipe=_differences(recipes),
        start=start,
        versions=_differences([run.versions for run in runs]),
        losses=_in_common([{s.step: s.loss for s in run.steps} for run in runs]),
        eval_losses=_in_common([{e.step: e.eval_loss for e in run.evals} for run in runs]),
        figures=_side_by_side([_figures(run) for run in runs]),
        verdicts=_side_by_side(claims),
        keys=len(_side_by_side(recipes)),
        notes=tuple(_notes(runs, start)),
    )


def _found(run: RunRecord) -> dict[str, Any]:
    """What a run found or chose at its start."""
    epochs = run.start.epochs
    found = asdict(run.start) | {"epochs": epochs if epochs is None else round(epochs, 2)}
    return {name: value for name, value in found.items() if name not in SHOWN_BELOW}


def _notes(runs: Sequence[RunRecord], start: Mapping[str, Any]) -> list[str]:
    notes = []
    if {"device", "world_size"} & start.keys():
        notes.append("the runs had different hardware: their speed and memory do not compare the recipes alone")
    tokens = [sum(step.tokens for step in run.steps) / max(1, len(run.steps)) for run in runs]
    if max(tokens) > 1.02 * min(tokens):
        means = ", ".join(f"{mean:,.0f}" for mean in tokens)
        notes.append(f"a step is not the same amount of data in each run: {means} tokens on average")
    return notes


def _figures(run: RunRecord) -> dict[str, float | None]:
    losses, evals = [s.loss for s in run.steps], [e.eval_loss for e in run.evals]
    compiled = [rank.compile for rank in run.ranks]
    return {
        "first loss": losses[0] if losses else None,
        "last loss": losses[-1] if losses else None,
        "first eval loss": evals[0] if evals else None,
        "best eval loss": min(evals) if evals else None,
        "last eval loss": evals[-1] if evals else None,
        "eval loss of the adapter": run.eval_adapter,
        "steps": run.steps[-1].step if run.steps else None,
        "tokens": sum(s.tokens for s in run.steps),
        "tokens/s": sum(rank.tokens_per_s for rank in run.ranks),
        "supervised tokens/s": sum(rank.supervised_tokens_per_s for rank in run.ranks),
        "step ms, median": max(rank.step_ms_median for rank in run.ranks),
        "step ms, p90": max(rank.step_ms_p90 for rank in run.ranks),
        "peak memory MiB": max(rank.vram_peak_mib for rank in run.ranks),
        "compilations": max(c.compilations for c in compiled),
        "planned graphs": max(c.planned_graphs for c in compiled),
        "graph breaks": sum(c.graph_breaks for c in compiled),
        "recompiles": sum(c.recompiles for c in compiled),
        "compile s": max(c.forward_s + c.backward_s for c in compiled),
        "elapsed s": sum(run.elapsed_s.values()),
    }


def _side_by_side(sides: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Every key of any side, in their order, with each side's value; None where it has none."""
    keys = dict.fromkeys(key for side in sides for key in side)
    return {key: tuple(side.get(key) for side in sides) for key in keys}


def _differences(sides: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    together = _side_by_side(sides)
    return {key: v for key, v in together.items() if key not in OWN and any(value != v[0] for value in v)}


def _in_common(sides: Sequence[Mapping[int, float]]) -> dict[int, tuple[float, ...]]:
    steps = sorted(set(sides[0]).intersection(*sides[1:]))
    return {step: tuple(side[step] for side in sides) for step in sampled(steps, LOSSES_KEPT)}
