"""The parent process of mode=bench: data, ours and the naive sides, each measured in a child process. Imports no torch.

The data comes first and alone, so that both sides find it prepared and the libraries and model files in the page cache.
Ours runs before naive: whatever is still cold by then counts against us. Where the first adapter is computed
(lora.init=loftq, eva), ours writes it to a file that the naive sides read.
"""

from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from launcher.errors import LauncherError
from launcher.proof.bench.figures import bench_record
from launcher.proof.bench.processes import ChildFailed, run_child
from launcher.proof.noise import NEFTUNE, with_plain_start, without_noise
from launcher.recipe.lora_section import COMPUTED_STARTS
from launcher.records.bench import BenchRecord, OursRecord, SideRecord, Workload
from launcher.runtime.environment import prepare_environment, quick_imports
from launcher.train.request import Request

# The naive sides of `proof.bench_naive`, with checkpointing ("naive") and without ("plain").
PARTS_OF = {"on": ("naive", "plain"), "checkpointed": ("naive",), "plain": ("plain",), "off": ()}


def bench(request: Request) -> Iterator[str | BenchRecord]:
    """Measure `proof.bench` steps on each side; yields the names of phases and, last, the record.

    Raises the errors of launcher/errors.py where the data or our side fails. How naive fails is in the record.
    """
    with TemporaryDirectory() as folder:
        yield from _bench(request, Path(folder) / "start.safetensors")


def _bench(request: Request, start: Path) -> Iterator[str | BenchRecord]:
    """`start`: the file in which our side hands its first adapter to the others, where that is computed."""
    asked, (request, quiet) = request.recipe, without_noise(request, NEFTUNE)
    handed = start if asked.lora.init in COMPUTED_STARTS else None
    proof, (stock, plain) = asked.proof, with_plain_start(request)
    yield "reading data"
    workload: Workload = yield from _run("workload", request, name="the data: ")
    yield "ours: starting"
    ours: OursRecord = yield from _run("ours", request, name="our side: ", start=handed)
    sides: dict[str, SideRecord] = {}
    for name in PARTS_OF[proof.bench_naive]:
        yield f"{name}: starting"
        try:
            sides[name] = yield from _run(name, stock, start=handed)
        except LauncherError as error:
            sides[name] = SideRecord(failure=str(error))
    notes = [*quiet, *(plain if sides else ()), *ours.compile.fallbacks]
    if asked.compile.mode == "off":
        notes.append("compile.mode=off: ours is not compiled")
    notes += [f"{name}: {side.failure}" for name, side in sides.items() if side.failure]
    yield bench_record(
        asked.model_dump(mode="json"),
        rows=proof.bench_rows,
        workload=workload,
        ours=ours,
        sides=sides,
        notes=tuple(notes),
    )


def _run(part: str, request: Request, *, name: str = "", start: Path | None = None) -> Generator[str, None, Any]:
    """Passes on the phases of a part and returns its record. `name` begins the message where its process failed."""
    record: Any = None
    try:
        for event in run_child(partial(measure, part, start=start), request):
            if isinstance(event, str):
                yield event
            else:
                record = event
    except ChildFailed as error:
        raise ChildFailed(f"{name}{error}") from error
    return record


def measure(part: str, request: Request, *, start: Path | None = None) -> Iterator[Any]:
    """What a child process runs: "workload", "ours", "naive" or "plain". Yields phases and, last, the part's record.
    `start`: where ours writes the adapter that the others begin with."""
    prepare_environment()
    with quick_imports():
        from launcher.proof.bench.side import naive, ours
        from launcher.proof.bench.workload import workload

    parts: dict[str, Callable[[Request], Iterator[Any]]]
    stock = partial(naive, start=start)
    parts = {
        "workload": workload,
        "ours": partial(ours, start=start),
        "naive": stock,
        "plain": partial(stock, checkpointed=False),
    }
    yield from parts[part](request)
