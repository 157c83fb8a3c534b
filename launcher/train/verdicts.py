"""The claims of a run, each decided from counters. A claim that does not hold fails a strict run (code 9)."""

from collections.abc import Sequence
from statistics import fmean, pvariance

from launcher.records.run import CompileRecord, StepRecord, Verdict

LEAST_STEPS = 20  # of fewer it cannot be told whether they taught anything


def compile_verdicts(records: Sequence[CompileRecord], *, steps: int) -> list[Verdict]:
    """Graph breaks, recompiles, graph counts, whether steps ran compiled and, with several ranks, whether they compiled
    the same graphs. `records`: one of each rank. `steps`: how many were done; none by a run that goes on after its last
    one."""
    breaks = [record.graph_breaks for record in records]
    recompiles = [record.recompiles for record in records]
    limits = [record.limit_hits for record in records]
    planned = all(r.compilations == r.planned_graphs == r.expected_graphs and not r.fallbacks for r in records)
    compilations = _counts([record.compilations for record in records], "compilations")
    verdicts = [
        Verdict("zero graph breaks", not any(breaks), _counts(breaks, "graph breaks")),
        Verdict("zero recompiles", not any(recompiles + limits), _counts(recompiles, "recompiles")),
        Verdict("exactly the planned graphs", planned, f"{compilations}, {records[0].expected_graphs} planned"),
    ]
    if steps:
        verdicts.append(steps_verdict(records))
    if len(records) > 1:
        hashes = sorted({record.graph_hash for record in records})
        claim = "every rank compiled the same graphs"
        verdicts.append(Verdict(claim, len(hashes) == 1, f"hashes {', '.join(hashes)}"))
    return verdicts


def steps_verdict(records: Sequence[CompileRecord]) -> Verdict:
    """Whether every step and evaluation after warm-up made all planned calls of compiled code, on every rank."""
    passes = [(r.steps_compiled, r.steps, r.evaluations_compiled, r.evaluations) for r in records]
    holds = all(steps and done == steps and evaluated == evaluations for done, steps, evaluated, evaluations in passes)
    figures = [f"{p[0]} of {p[1]} steps, {p[2]} of {p[3]} evaluated micro batches" for p in dict.fromkeys(passes)]
    calls = ", ".join(f"{name} {n}" for name, n in records[0].calls.items())
    return Verdict("every step ran compiled", holds, f"{' / '.join(figures)}; calls a micro batch: {calls or 'none'}")


def learning_verdict(steps: Sequence[StepRecord], eval_losses: Sequence[float]) -> Verdict | None:
    """Whether training lowered a loss: the eval loss, or where it did not (or there is none) the mean training loss of
    the last tenth of the steps against the first tenth's. None for a run that is too short to tell.

    `eval_losses`: before the first step, and so on, that of the saved adapter last.
    With evaluations the training loss must have fallen by more than twice the standard error of that difference;
    without, it fails only where it rose by as much. No gradient at all in the last tenth fails in any case.
    """
    if len(steps) < LEAST_STEPS:
        return None
    tenth = max(5, len(steps) // 10)
    first, last = ([step.loss for step in part] for part in (steps[:tenth], steps[-tenth:]))
    change = fmean(last) - fmean(first)
    scatter = 2 * ((pvariance(first) + pvariance(last)) / tenth) ** 0.5
    evaluated = len(eval_losses) > 1
    lower = change < (-scatter if evaluated else scatter) or (evaluated and eval_losses[-1] < eval_losses[0])
    dead = not any(step.grad_norm for step in steps[-tenth:])
    figures = [f"eval loss {eval_losses[0]:.4f} before, {eval_losses[-1]:.4f} after"] if evaluated else []
    figures.append(
        f"training loss {fmean(first):.4f} in the first {tenth} steps, {fmean(last):.4f} in the last {tenth}"
    )
    figures += [f"gradient norm 0 in the last {tenth} steps"] if dead else []
    return Verdict("training lowered the loss", lower and not dead, "; ".join(figures))


def _counts(counts: Sequence[int], noun: str) -> str:
    """One figure where the ranks agree, else one for each."""
    figures = str(counts[0]) if len(set(counts)) == 1 else " / ".join(map(str, counts))
    return f"{figures} {noun}" + (f" on each of {len(counts)} ranks" if len(counts) > 1 else "")
