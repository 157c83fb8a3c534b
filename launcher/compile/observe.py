"""Counts what torch.compile does in this process: graphs, breaks, recompiles, limit hits, seconds, cache hits.

It needs three sources:
- the wrapper around the backend sees every graph, so it counts them by region and hashes them;
- dynamo's compilation metrics list every attempt with seconds and reasons, failed and refused ones included;
- dynamo's counters have the breaks that raised nothing, and the cache hits.

Dynamo's counters live as long as the process: all numbers are differences from the state at `Observer()`.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters, get_compilation_metrics, set_compilation_metrics_limit

from launcher.records.run import CompileRecord

COMPILE_ERRORS = (torch._dynamo.exc.TorchDynamoException, FailOnRecompileLimitHit)
MAX_METRICS = 100_000  # dynamo keeps the last 64 by default


class Observer:
    """Counts the compilations of one process from its creation on."""

    def __init__(self) -> None:
        set_compilation_metrics_limit(MAX_METRICS)
        self._first = len(get_compilation_metrics())
        self._armed_at: int | None = None
        self._graphs: list[tuple[str, str]] = []  # (region, digest) in order of compilation
        self._planned: int | None = None  # number of graphs when warm-up ended
        self._counters = _flat_counters()
        self.expected: dict[str, int] = {}  # graphs that warm-up must compile, by region
        self.fallbacks: list[str] = []

    def backend(self, region: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        """A dynamo backend like `inner` which also counts each graph under `region`."""

        def observed(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
            self._graphs.append((region, _digest(graph, example_inputs)))
            return inner(graph, example_inputs)

        return observed

    def arm(self) -> None:
        """Warm-up is over: from now on every compilation is unplanned."""
        self._armed_at = len(get_compilation_metrics())
        self._planned = len(self._graphs)

    def graphs_by_region(self) -> dict[str, int]:
        """The number of graphs so far, by region."""
        return dict(Counter(region for region, _ in self._graphs))

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
        warm = Counter(region for region, _ in self._graphs[: self._planned])
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
            graph_hash=self._hash(),
            graph_break_reasons=tuple(breaks),
            recompile_reasons=tuple(_recompile(m) for m in failed["recompile"] + unplanned + late),
            backend_error_reasons=tuple(_reason(m) for m in failed["backend"]),
            fallbacks=tuple(self.fallbacks),
            graphs_by_region=self.graphs_by_region(),
        )

    def _after_warm_up(self) -> list[Any]:
        """Compilations after `arm` that succeeded."""
        if self._armed_at is None:
            return []
        return [m for m in self._forward_metrics(since=self._armed_at) if m.fail_type is None]

    def _metrics(self, since: int | None = None) -> list[Any]:
        return get_compilation_metrics()[self._first if since is None else since :]

    def _forward_metrics(self, since: int | None = None) -> list[Any]:
        return [m for m in self._metrics(since) if m.is_forward is not False and not m.is_runtime]

    def _hash(self) -> str:
        if not self._graphs:
            return "-"
        return hashlib.sha256("".join(digest for _, digest in self._graphs).encode()).hexdigest()[:16]


def _flat_counters() -> Counter[str]:
    return Counter({f"{group}.{key}": n for group, entries in counters.items() for key, n in entries.items()})


def _digest(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> str:
    """A digest of code and inputs without addresses or device indices: equal on all ranks for equal programs."""
    inputs = [
        f"{tuple(t.shape)}{t.stride()}{t.dtype}{t.device.type}{t.requires_grad}"
        if isinstance(t, torch.Tensor)
        else str(t)
        for t in example_inputs
    ]
    return hashlib.sha256("\n".join([without_device_index(graph.code), *inputs]).encode()).hexdigest()


def without_device_index(code: str) -> str:
    """Graph code with `cuda, index=1` and `cuda:1` replaced by `cuda`, since each rank names its own device."""
    return re.sub(r"(?<=')(cuda)(?:', index=\d+|:\d+')", r"\1'", code)


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


def _recompile(metric: Any) -> str:
    """The function and the guard that failed; dynamo's message of a refused recompile has both."""
    if metric.fail_reason:
        return " ".join(line.strip() for line in metric.fail_reason.strip().splitlines())
    return f"{metric.co_filename}:{metric.co_firstlineno} {metric.recompile_reason}"
