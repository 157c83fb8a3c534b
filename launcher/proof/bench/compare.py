"""The measurement as its parent process sees it: the data, ours, naive, one process after the other. Imports no torch.

The data comes first and alone, so that both sides find it prepared, and the libraries and the model's files read once.
Ours comes before naive: what the machine still has to read or to clock up is then on our account.
"""

from collections.abc import Generator, Iterator
from typing import Any

from launcher.errors import LauncherError
from launcher.proof.bench.figures import bench_record
from launcher.proof.bench.processes import ChildFailed, run_child
from launcher.records.bench import BenchRecord, OursRecord, SideRecord, Workload
from launcher.runtime.environment import prepare_environment, quick_imports
from launcher.train.request import Request


def bench(request: Request) -> Iterator[str | BenchRecord]:
    """Measure `proof.bench` steps on each side; yields the names of phases and, last, the record.

    Raises the errors of launcher/errors.py where the data or our side fails. How naive fails is said by the record.
    """
    proof = request.recipe.proof
    yield "reading data"
    workload: Workload = yield from _needed(run_child(_workload, request), "the data")
    yield "ours: starting"
    ours: OursRecord = yield from _needed(run_child(_ours, request), "our side")
    naive: SideRecord | None = None
    if proof.bench_naive:
        yield "naive: starting"
        try:
            naive = yield from _last(run_child(_naive, request))
        except LauncherError as error:
            naive = SideRecord(failure=str(error))
    yield bench_record(
        request.recipe.model_dump(mode="json"),
        rows=proof.bench_rows,
        workload=workload,
        ours=ours,
        naive=naive,
        notes=_notes(request, ours, naive),
    )


def _needed(events: Iterator[Any], who: str) -> Generator[str, None, Any]:
    """As `_last`; a process that failed is named."""
    try:
        return (yield from _last(events))
    except ChildFailed as error:
        raise ChildFailed(f"{who}: {error}") from error


def _last(events: Iterator[Any]) -> Generator[str, None, Any]:
    """Passes phases on and returns the record behind them."""
    record: Any = None
    for event in events:
        if isinstance(event, str):
            yield event
        else:
            record = event
    return record


def _notes(request: Request, ours: OursRecord, naive: SideRecord | None) -> tuple[str, ...]:
    found = [*ours.compile.fallbacks]
    if request.recipe.compile.mode == "off":
        found.append("compile.mode=off: ours is not compiled")
    if naive is not None and naive.failure:
        found.append(f"naive: {naive.failure}")
    return tuple(found)


def _workload(request: Request) -> Iterator[Any]:
    with quick_imports():
        from launcher.proof.bench.workload import bench_request, workload

    yield workload(bench_request(_prepare(request)))


def _ours(request: Request) -> Iterator[Any]:
    with quick_imports():
        from launcher.proof.bench.side import ours

    yield from ours(_prepare(request))


def _naive(request: Request) -> Iterator[Any]:
    with quick_imports():
        from launcher.proof.bench.side import naive

    yield from naive(_prepare(request))


def _prepare(request: Request) -> Request:
    """Settle the environment of this child process; the variables are inherited."""
    prepare_environment()
    return request
