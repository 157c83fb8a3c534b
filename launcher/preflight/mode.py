"""mode=check: everything that a run needs, all checked whatever fails before."""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

from launcher.compile.inductor_cache import prepare_cache
from launcher.preflight.before_torch import check_before_torch
from launcher.preflight.lines import Checks
from launcher.recipe.field_types import recipes_dir
from launcher.recipe.load import Resolved
from launcher.records.check import CheckRecord
from launcher.runtime.environment import prepare_environment, quick_imports
from launcher.runtime.ranks import RankInfo
from launcher.train.request import Request


def check(resolved: Resolved, info: RankInfo, checks: Checks) -> Iterator[str | CheckRecord]:
    """Yields the phases and, last, the record; the lines are in `checks` too. One process checks for all processes of
    its machine."""
    prepare_environment()
    prepare_cache(workers=info.cores)
    shipped = recipes_dir()
    yield "checking the recipe"
    located = check_before_torch(checks, resolved, shipped=shipped, cores=info.cores, trains=True)
    yield "importing torch"
    later = checks.add("imports", _with_torch, found=lambda _: "torch and all that is imported with it")
    yield "checking device, tools, model and data"
    source = located.source
    if source is not None and later is not None:
        request = Request(resolved.recipe, resolved.name, source, shipped, info)
        ranks = [replace(info, rank=number, local_rank=number) for number in range(info.local_world_size)]
        later.check_with_torch(checks, request, ranks, folder=located.folder)
        later.check_sources(checks, request)
    yield CheckRecord(resolved.name, source or resolved.recipe.model.name, tuple(checks.lines))


def _with_torch() -> ModuleType:
    with quick_imports():
        from launcher.preflight import with_torch

        return with_torch
