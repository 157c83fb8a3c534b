"""The claims of a run, each decided from what was counted. A claim that does not hold fails a strict run (code 9)."""

import math
from collections.abc import Sequence

from launcher.records.run import CompileRecord, EvalRecord, RankRecord, StepRecord, Verdict


def compile_verdicts(ranks: Sequence[RankRecord]) -> list[Verdict]:
    """Breaks, recompiles, graph counts and, with several ranks, whether they compiled the same."""
    records = [rank.compile for rank in ranks]
    breaks, recompiles, limits = (_each(records, name) for name in ("graph_breaks", "recompiles", "limit_hits"))
    verdicts = [
        Verdict("zero graph breaks", not any(breaks), _say(breaks, "graph breaks")),
        Verdict("zero recompiles", not any(recompiles + limits), _say(recompiles, "recompiles")),
        Verdict(
            "exactly the planned graphs",
            all(r.compilations == r.planned_graphs == r.expected_graphs and not r.fallbacks for r in records),
            f"{_say([r.compilations for r in records], 'compilations')}, {records[0].expected_graphs} planned",
        ),
    ]
    if len(records) > 1:
        hashes = {r.graph_hash for r in records}
        verdicts.append(
            Verdict("every rank compiled the same graphs", len(hashes) == 1, f"hashes {', '.join(sorted(hashes))}")
        )
    return verdicts


def loss_verdict(steps: Sequence[StepRecord], evals: Sequence[EvalRecord]) -> Verdict:
    """Whether every loss, of steps and of evaluations, was a number."""
    losses = [s.loss for s in steps] + [e.eval_loss for e in evals]
    finite = sum(map(math.isfinite, losses))
    skipped = sum(s.skipped for s in steps)
    extra = f", {skipped} steps skipped for fp16 overflow" if skipped else ""
    said = f"{finite} of {len(losses)}: {len(steps)} steps, {len(evals)} evaluations{extra}"
    return Verdict("loss finite", finite == len(losses), said)


def _each(records: Sequence[CompileRecord], name: str) -> list[int]:
    return [getattr(record, name) for record in records]


def _say(counts: list[int], noun: str) -> str:
    spread = str(counts[0]) if len(set(counts)) == 1 else " / ".join(map(str, counts))
    return f"{spread} {noun}" + (f" on each of {len(counts)} ranks" if len(counts) > 1 else "")
