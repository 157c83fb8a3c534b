"""The claims of a run, each decided from counters. A claim that does not hold fails a strict run (code 9)."""

import math
from collections.abc import Sequence

from launcher.records.run import EvalRecord, RankRecord, StepRecord, Verdict


def compile_verdicts(ranks: Sequence[RankRecord]) -> list[Verdict]:
    """Graph breaks, recompiles, graph counts and, with several ranks, whether they compiled the same graphs."""
    records = [rank.compile for rank in ranks]
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
    if len(records) > 1:
        hashes = sorted({record.graph_hash for record in records})
        claim = "every rank compiled the same graphs"
        verdicts.append(Verdict(claim, len(hashes) == 1, f"hashes {', '.join(hashes)}"))
    return verdicts


def loss_verdict(steps: Sequence[StepRecord], evals: Sequence[EvalRecord]) -> Verdict:
    """Whether the loss of every step and evaluation is finite."""
    losses = [step.loss for step in steps] + [record.eval_loss for record in evals]
    finite = sum(map(math.isfinite, losses))
    skipped = sum(step.skipped for step in steps)
    suffix = f", {skipped} steps skipped for fp16 overflow" if skipped else ""
    evidence = f"{finite} of {len(losses)}: {len(steps)} steps, {len(evals)} evaluations{suffix}"
    return Verdict("loss finite", finite == len(losses), evidence)


def _counts(counts: Sequence[int], noun: str) -> str:
    """One figure where the ranks agree, else one for each."""
    figures = str(counts[0]) if len(set(counts)) == 1 else " / ".join(map(str, counts))
    return f"{figures} {noun}" + (f" on each of {len(counts)} ranks" if len(counts) > 1 else "")
