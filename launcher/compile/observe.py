"""Counts what torch.compile does in this process: graphs, breaks, recompiles, limit hits, seconds, cache hits.

It has three sources:
- the wrapper around the backend sees every graph, so it counts them by region and hashes them; what it returns counts
  the calls of compiled code, forward and backward: a graph that exists may still not be what runs;
- dynamo's compilation metrics list every attempt with seconds and reasons, failed and refused ones included;
- dynamo's counters have the breaks that raised nothing, and the cache hits.

Dynamo's counters live as long as the process: all numbers are differences from the state at `Observer()`.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters, get_compilation_metrics, set_compilation_metrics_limit

from launcher.compile import witness
from launcher.compile.contents import contents
from launcher.compile.explain import GuardValues, explain
from launcher.compile.inductor_cache import OPS, key_tag
from launcher.records.explanation import Explanation
from launcher.records.run import CompileRecord, GraphRecord

COMPILE_ERRORS = (torch._dynamo.exc.TorchDynamoException, FailOnRecompileLimitHit)
MAX_METRICS = 100_000  # dynamo keeps the last 64 by default


class Observer:
    """Counts the compilations of one process from its creation on."""

    def __init__(self) -> None:
        set_compilation_metrics_limit(MAX_METRICS)
        self._first = len(get_compilation_metrics())
        self._armed_at: int | None = None
        self._graphs: list[GraphRecord] = []  # in order of compilation
        self._planned: int | None = None  # number of graphs when warm-up ended
        self._counters = _flat_counters()
        self._errors: list[Explanation] = []
        witness.begin()
        self.expected: dict[str, int] = {}  # graphs that warm-up must compile, by region
        self.fallbacks: list[str] = []
        self.calls: Counter[str] = Counter()  # of compiled code: "REGION" forward, "REGION backward"
        self.expected_calls: dict[str, int] = {}  # of one micro batch of the largest shape
        self.passes: Counter[tuple[str, bool]] = Counter()  # ("step" or "evaluation", whether it ran compiled)

    def backend(self, region: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        """A dynamo backend like `inner` which also counts each graph under `region`."""

        def observed(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
            self._graphs.append(contents(region, graph, example_inputs))
            witness.see_graph()
            return self._counted(region, inner(graph, example_inputs))

        return observed

    def _counted(self, region: str, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, which then counts its calls. Its outputs have one node of autograd in common, whose pre-hook
        counts those of the backward pass: it works the same for code from a cache."""

        def count_backward(gradients: object) -> None:
            self.calls[f"{region} backward"] += 1

        def call(*inputs: Any) -> Any:
            self.calls[region] += 1
            outputs = compiled(*inputs)
            for output in outputs:
                if isinstance(output, torch.Tensor) and output.grad_fn is not None:
                    output.grad_fn.register_prehook(count_backward)
                    break
            return outputs

        return call

    def arm(self) -> None:
        """Warm-up is over: from now on every compilation is unplanned."""
        self._armed_at = len(get_compilation_metrics())
        self._planned = len(self._graphs)

    def explain_error(self, error: BaseException) -> Explanation:
        """Why dynamo raised this error; `record` has it too."""
        kind, raw, values, where = failure_kind(type(error).__name__), str(error), witness.values_at(error), ""
        if kind == "limit" and (metrics := self._metrics()):  # its own words do not name the guard
            guards, values, where = _guards(metrics[-1])
            raw = f"{raw}\n{guards}"
        self._errors.append(explain(kind, raw, values=values, where=where))
        return self._errors[-1]

    def graphs_by_region(self) -> dict[str, int]:
        """The number of graphs so far, by region."""
        return dict(Counter(graph.region for graph in self._graphs))

    @property
    def unplanned(self) -> int:
        """Compilations since `arm`."""
        return len(self._after_warm_up())

    def record(self) -> CompileRecord:
        """All counts so far."""
        attempts, new = self._forward_metrics(), _flat_counters() - self._counters
        done = [m for m in attempts if m.fail_type is None]
        failed: dict[str, list[Any]] = defaultdict(list)
        for metric in attempts:
            if metric.fail_type is not None:
                failed[failure_kind(metric.fail_type)].append(metric)
        # In warm-up the second graph of a region may be planned (train, eval): only those in excess are recompiles.
        warm = Counter(graph.region for graph in self._graphs[: self._planned])
        excess = sum((warm - Counter(self.expected)).values())
        late = self._after_warm_up()
        unplanned = [m for m in done if m.recompile_reason and m not in late][-excess:] if excess else []
        # Breaks that raised nothing, which is only possible where something is compiled without fullgraph.
        silent = [key.removeprefix("graph_break.") for key in new.elements() if key.startswith("graph_break.")]
        breaks = [_reason(m) for m in failed["break"]] + silent
        return CompileRecord(
            planned_graphs=sum((warm & Counter(self.expected)).values()),
            expected_graphs=sum(self.expected.values()),
            compilations=len(done) + len(failed["break"]) + len(failed["backend"]),
            graph_breaks=len(breaks),
            recompiles=len(failed["recompile"]) + excess + len(late),
            limit_hits=len(failed["limit"]),
            backend_errors=len(failed["backend"]),
            forward_s=sum(m.entire_frame_compile_time_s or 0.0 for m in attempts),
            backward_s=sum((m.duration_us or 0) / 1e6 for m in self._metrics() if m.is_forward is False),
            cache_hits=new["inductor.fxgraph_cache_hit"],
            cache_misses=new["inductor.fxgraph_cache_miss"] + new["inductor.fxgraph_cache_bypass"],
            graph_hash=self._hash(),
            graph_break_reasons=tuple(breaks),
            recompile_reasons=tuple(_recompile(m) for m in failed["recompile"] + unplanned + late),
            backend_error_reasons=tuple(_reason(m) for m in failed["backend"]),
            fallbacks=tuple(self.fallbacks),
            graphs_by_region=self.graphs_by_region(),
            graphs=tuple(self._graphs),
            steps=self._passes("step"),
            steps_compiled=self.passes["step", True],
            evaluations=self._passes("evaluation"),
            evaluations_compiled=self.passes["evaluation", True],
            calls=self.expected_calls,
            explanations=tuple(self._explanations(failed, silent, unplanned + late)),
        )

    def _explanations(
        self, failed: dict[str, list[Any]], silent: list[str], recompiled: list[Any]
    ) -> Iterator[Explanation]:
        """Of the errors, of failures that someone else caught, of breaks without an error, and of recompiles."""
        yield from self._errors
        for kind, metrics in failed.items():
            for metric in metrics:
                said = (metric.fail_reason or metric.fail_type).strip()
                if not any(error.raw.startswith(said) for error in self._errors):
                    where = f"{metric.fail_user_frame_filename}:{metric.fail_user_frame_lineno}"
                    yield explain(kind, said, where=where if metric.fail_user_frame_filename else "")
        yield from (explain("break", reason) for reason in silent)
        for metric in recompiled:
            guards, values, where = _guards(metric)
            yield explain("recompile", guards, values=values, where=where)

    def _after_warm_up(self) -> list[Any]:
        """Compilations after `arm` that succeeded."""
        if self._armed_at is None:
            return []
        return [m for m in self._forward_metrics(since=self._armed_at) if m.fail_type is None]

    def _metrics(self, since: int | None = None) -> list[Any]:
        return get_compilation_metrics()[self._first if since is None else since :]

    def _forward_metrics(self, since: int | None = None) -> list[Any]:
        return [m for m in self._metrics(since) if m.is_forward is not False and not m.is_runtime]

    def _passes(self, kind: str) -> int:
        return self.passes[kind, True] + self.passes[kind, False]

    def _hash(self) -> str:
        if not self._graphs:
            return "-"
        program = "".join([key_tag(OPS), *(graph.digest for graph in self._graphs)])
        return hashlib.sha256(program.encode()).hexdigest()[:16]


def _flat_counters() -> Counter[str]:
    return Counter({f"{group}.{key}": n for group, entries in counters.items() for key, n in entries.items()})


def failure_kind(error_type: str) -> str:
    """The kind of a failed compilation (limit, recompile, backend or break) by the name of dynamo's exception."""
    if "LimitHit" in error_type:
        return "limit"
    kinds = {"RecompileError": "recompile", "BackendCompilerFailed": "backend", "InductorError": "backend"}
    return kinds.get(error_type, "break")


def _reason(metric: Any) -> str:
    """The line of the error that says why, and the place in the user's code."""
    lines = (metric.fail_reason or metric.fail_type).strip().splitlines()
    names_backend = failure_kind(metric.fail_type) == "backend" and len(lines) > 1  # its first line says no more
    why = lines[1] if names_backend else lines[0]
    where = f" ({metric.fail_user_frame_filename}:{metric.fail_user_frame_lineno})"
    return why + (where if metric.fail_user_frame_filename else "")


def _guards(metric: Any) -> tuple[str, GuardValues, str]:
    """What dynamo says of the guards that failed before a recompile, their values, and where the function stands."""
    reason = metric.recompile_reason or "compiled for the first time after warm-up"
    where = f"{metric.co_filename}:{metric.co_firstlineno}" if metric.co_filename else ""
    return witness.recompile(metric.compile_id) or (reason, {}, where)


def _recompile(metric: Any) -> str:
    """The function and the guard that failed; dynamo's message of a refused recompile has both."""
    if metric.fail_reason:
        return " ".join(line.strip() for line in metric.fail_reason.strip().splitlines())
    return f"{metric.co_filename}:{metric.co_firstlineno} {metric.recompile_reason}"
