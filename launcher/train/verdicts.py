"""The claims of a run, each decided from counters. A claim that does not hold fails a strict run (code 9)."""

from collections.abc import Sequence

from launcher.records.run import CompileRecord, Verdict


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


def _counts(counts: Sequence[int], noun: str) -> str:
    """One figure where the ranks agree, else one for each."""
    figures = str(counts[0]) if len(set(counts)) == 1 else " / ".join(map(str, counts))
    return f"{figures} {noun}" + (f" on each of {len(counts)} ranks" if len(counts) > 1 else "")
