"""Counts what torch.compile does in this process: graphs, breaks, recompiles, limit hits, seconds, cache hits.

Three sources, each for what it alone can see:
- the backend wrapper sees every graph that reaches the backend, hence their number by region and their hash;
- dynamo's compilation metrics see every attempt, failed ones included, with seconds, reasons and user lines;
- an exception seen by the caller tells of a recompile that the armed guard refused, which leaves no metric.

Everything is a difference against the state at `Observer()`: dynamo's own counters live as long as the process.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit, RecompileError
from torch._dynamo.utils import counters, get_compilation_metrics, set_compilation_metrics_limit

from launcher.records import CompileRecord

COMPILE_ERRORS = (torch._dynamo.exc.TorchDynamoException, FailOnRecompileLimitHit)
METRICS_KEPT = 100_000  # dynamo keeps 64 by default, and the 65th would push out the first


class Observer:
    """One process's account of compilation, from its creation on."""

    def __init__(self) -> None:
        set_compilation_metrics_limit(METRICS_KEPT)
        self._first = len(get_compilation_metrics())
        self._armed_at: int | None = None
        self._graphs: list[tuple[str, str]] = []  # (region, digest) in order of compilation
        self._graphs_armed = 0
        self._counters = _flat_counters()
        self._refused: list[str] = []
        self.expected = 0
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

    def saw(self, error: BaseException) -> None:
        """Note a compile error the caller caught. Only a refused recompile is news: the metrics have the rest."""
        if isinstance(error, RecompileError):
            self._refused.append(str(error).strip())

    def graphs_by_region(self) -> dict[str, int]:
        """Graphs so far, by region."""
        return dict(Counter(region for region, _ in self._graphs))

    @property
    def unplanned(self) -> int:
        """Compilations since `arm`."""
        return len(self._late())

    def record(self) -> CompileRecord:
        """The account so far."""
        attempts = self._forward_metrics()
        now = _flat_counters()
        refused = [m for m in attempts if m.fail_type is not None and "LimitHit" in m.fail_type]
        broken = [m for m in attempts if m.fail_type is not None and m not in refused]
        breaks = [_reason(m) for m in broken] + self._counted_breaks(now)
        late = self._late()
        warm = [m for m in attempts if m.fail_type is None][: -len(late) or None]
        # In warm-up a second graph of one frame is planned (train, eval); only the surplus is recompiles.
        surplus = max(0, len(warm) - self.expected)
        unplanned = ([m for m in warm if m.recompile_reason][-surplus:] if surplus else []) + late
        reasons = self._refused + [f"{m.co_filename}:{m.co_firstlineno} {m.recompile_reason}" for m in unplanned]
        return CompileRecord(
            planned_graphs=min(self._graphs_armed or len(self._graphs), self.expected),
            expected_graphs=self.expected,
            compilations=len(attempts) - len(refused),
            graph_breaks=len(breaks),
            recompiles=len(self._refused) + surplus + len(late),
            limit_hits=len(refused),
            forward_s=sum(m.entire_frame_compile_time_s or 0.0 for m in attempts),
            backward_s=sum((m.duration_us or 0) / 1e6 for m in self._metrics() if m.is_forward is False),
            cache_hits=self._since(now, "inductor.fxgraph_cache_hit"),
            graph_hash=self._hash(),
            graph_break_reasons=tuple(breaks),
            recompile_reasons=tuple(reasons),
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


def _reason(metric: Any) -> str:
    """The first line of why, and where in the user's code."""
    why = (metric.fail_reason or metric.fail_type).strip().splitlines()[0]
    return f"{why} ({metric.fail_user_frame_filename}:{metric.fail_user_frame_lineno})"
