"""Counts what torch.compile does in this process: graphs, breaks, recompiles, limit hits, seconds, cache hits.

Three sources, each for what it alone can see:
- the backend wrapper sees every graph that reaches the backend, hence their number by region and their hash;
- dynamo's compilation metrics see every attempt with seconds and reasons, failed and refused ones included;
- dynamo's counters see breaks that raised nothing, and cache hits.

Everything is a difference against the state at `Observer()`: dynamo's own counters live as long as the process.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters, get_compilation_metrics, set_compilation_metrics_limit

from launcher.records.run import CompileRecord

COMPILE_ERRORS = (torch._dynamo.exc.TorchDynamoException, FailOnRecompileLimitHit)
METRICS_KEPT = 100_000  # dynamo keeps 64 by default, and the 65th would push out the first


class Observer:
    """One process's account of compilation, from its creation on."""

    def __init__(self) -> None:
        set_compilation_metrics_limit(METRICS_KEPT)
        self._first = len(get_compilation_metrics())
        self._armed_at: int | None = None
        self._graphs: list[tuple[str, str]] = []  # (region, digest) in order of compilation
        self._graphs_armed: int | None = None  # how many there were when warm-up ended
        self._counters = _flat_counters()
        self.expected: dict[str, int] = {}  # graphs by region that warm-up must compile
        self.fallbacks: list[str] = []

    def backend(self, region: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        """`inner` (a dynamo backend), with each graph it is given counted under `region`."""

        def observed(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
            self._graphs.append((region, _digest(graph, example_inputs)))
            return inner(graph, example_inputs)

        return observed

    def arm(self) -> None:
        """Warm-up is over: from here every compilation is unplanned."""
        self._armed_at = len(get_compilation_metrics())
        self._graphs_armed = len(self._graphs)

    def graphs_by_region(self) -> dict[str, int]:
        """Graphs so far, by region."""
        return dict(Counter(region for region, _ in self._graphs))

    @property
    def unplanned(self) -> int:
        """Compilations since `arm`."""
        return len(self._late())

    def record(self) -> CompileRecord:
        """The account so far."""
        attempts, now = self._forward_metrics(), _flat_counters()
        failed = {
            kind: [m for m in attempts if _kind(m) == kind] for kind in ("break", "recompile", "limit", "backend")
        }
        done = [m for m in attempts if m.fail_type is None]
        # In warm-up a second graph of one region is planned (train, eval); only a surplus is recompiles.
        warm = Counter(region for region, _ in self._graphs[: self._graphs_armed])
        surplus = sum((warm - Counter(self.expected)).values())
        late = self._late()
        unplanned = [m for m in done if m.recompile_reason and m not in late][-surplus:] if surplus else []
        breaks = [_reason(m) for m in failed["break"]] + self._counted_breaks(now)
        return CompileRecord(
            planned_graphs=sum((warm & Counter(self.expected)).values()),
            expected_graphs=sum(self.expected.values()),
            compilations=len(done) + len(failed["break"]) + len(failed["backend"]),
            graph_breaks=len(breaks),
            recompiles=len(failed["recompile"]) + surplus + len(late),
            limit_hits=len(failed["limit"]),
            backend_errors=len(failed["backend"]),
            forward_s=sum(m.entire_frame_compile_time_s or 0.0 for m in attempts),
            backward_s=sum((m.duration_us or 0) / 1e6 for m in self._metrics() if m.is_forward is False),
            cache_hits=self._since(now, "inductor.fxgraph_cache_hit"),
            graph_hash=self._hash(),
            graph_break_reasons=tuple(breaks),
            recompile_reasons=tuple(_recompile(m) for m in failed["recompile"] + unplanned + late),
            backend_error_reasons=tuple(_reason(m) for m in failed["backend"]),
            fallbacks=tuple(self.fallbacks),
            graphs_by_region=self.graphs_by_region(),
        )

    def _late(self) -> list[Any]:
        """Compilations after `arm` that went through."""
        if self._armed_at is None:
            return []
        return [m for m in self._forward_metrics(since=self._armed_at) if m.fail_type is None]

    def _metrics(self, since: int | None = None) -> list[Any]:
        return get_compilation_metrics()[self._first if since is None else since :]

    def _forward_metrics(self, since: int | None = None) -> list[Any]:
        return [m for m in self._metrics(since) if m.is_forward is not False and not m.is_runtime]

    def _since(self, now: Counter[str], key: str) -> int:
        return now[key] - self._counters[key]

    def _counted_breaks(self, now: Counter[str]) -> list[str]:
        """Breaks that did not raise: possible only where something is compiled without fullgraph."""
        new = now - self._counters
        return [key.split(".", 1)[1] for key, n in new.items() if key.startswith("graph_break.") for _ in range(n)]

    def _hash(self) -> str:
        if not self._graphs:
            return "-"
        return hashlib.sha256("".join(digest for _, digest in self._graphs).encode()).hexdigest()[:16]


def _flat_counters() -> Counter[str]:
    return Counter({f"{group}.{key}": n for group, entries in counters.items() for key, n in entries.items()})


def _digest(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> str:
    """Equal for equal programs on equal shapes, in any process or rank: code and inputs, no addresses or indices."""
    inputs = [
        f"{tuple(t.shape)}{t.stride()}{t.dtype}{t.device.type}{t.requires_grad}"
        if isinstance(t, torch.Tensor)
        else str(t)
        for t in example_inputs
    ]
    return hashlib.sha256("\n".join([without_device_index(graph.code), *inputs]).encode()).hexdigest()


def without_device_index(code: str) -> str:
    """Graph code with every `cuda, index=1` and `cuda:1` made plain `cuda`: each rank names its own device."""
    return re.sub(r"(?<=')(cuda)(?:', index=\d+|:\d+')", r"\1'", code)


def _kind(metric: Any) -> str:
    """What a failed attempt was; "" for one that succeeded."""
    failure = metric.fail_type or ""
    if "LimitHit" in failure:
        return "limit"
    kinds = {"": "", "RecompileError": "recompile", "BackendCompilerFailed": "backend", "InductorError": "backend"}
    return kinds.get(failure, "break")


def _reason(metric: Any) -> str:
    """The line of the failure that says why, and where in the user's code."""
    lines = (metric.fail_reason or metric.fail_type).strip().splitlines()
    why = lines[1] if _kind(metric) == "backend" and len(lines) > 1 else lines[0]  # its first only names the backend
    where = f" ({metric.fail_user_frame_filename}:{metric.fail_user_frame_lineno})"
    return why + (where if metric.fail_user_frame_filename else "")


def _recompile(metric: Any) -> str:
    """Function and guard: of a refused recompile dynamo's message has both."""
    if metric.fail_reason:
        return " ".join(line.strip() for line in metric.fail_reason.strip().splitlines())
    return f"{metric.co_filename}:{metric.co_firstlineno} {metric.recompile_reason}"
