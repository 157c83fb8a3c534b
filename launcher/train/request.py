"""What is asked of a run, a comparison or a benchmark. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.recipe.schema import Recipe
from launcher.runtime.ranks import RankInfo


@dataclass(frozen=True)
class Request:
    """A recipe whose model has been located, and the process that is to run it."""

    recipe: Recipe
    name: str  # the recipe's
    source: str  # the model: absolute folder or hub id
    shipped: Path  # the folder of the recipes
    rank_info: RankInfo
    notes: tuple[str, ...] = ()  # what the user should know, for the report
    origins: Mapping[str, str] = field(default_factory=dict)  # file or command line, of the keys that were given
    started_s: float | None = None  # by runtime/clock.py's boot_clock_s; None: when the process was started
