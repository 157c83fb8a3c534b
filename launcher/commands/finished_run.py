"""What every command that uses a finished run is handed, and how it finds the run."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from launcher.export.place import RunPlace, find_run
from launcher.recipe.field_types import recipes_dir
from launcher.recipe.locate import locate
from launcher.recipe.run_options import RunOptions
from launcher.runtime.environment import prepare_environment
from launcher.runtime.ranks import RankInfo


@dataclass(frozen=True)
class Invocation:
    """The surroundings of a command."""

    rank_info: RankInfo
    console: Console
    report: Path | None = None  # report=PATH, absolute; it may be written


def located(options: RunOptions) -> tuple[RunPlace, str]:
    """The run, and where its base is. Raises RecipeError where either cannot be had."""
    place = find_run(Path(options.run))
    prepare_environment()
    return place, locate(place.recipe.model, recipes_dir() / "architectures")
