"""What can be checked before torch is imported, which takes 8 seconds to a minute. Imports no torch."""

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launcher.checkpoint.files import writable
from launcher.checkpoint.folder import RunFolder, default_folder, named_folder
from launcher.checkpoint.start_adapter import check_start
from launcher.data.read.columns import reshape_of
from launcher.data.read.sources import local_files
from launcher.errors import CheckpointError, DataError, RecipeError
from launcher.model.config_file import check_config_file
from launcher.preflight.lines import Checks
from launcher.recipe.data_section import Source
from launcher.recipe.load import Resolved
from launcher.recipe.locate import config_file, locate
from launcher.recipe.schema import Recipe
from launcher.runtime.launch_flags import check_launch_flags
from launcher.runtime.packages import unfit_packages

REPORT_BEGIN = re.compile(rb'\{\s*"schema": \d+,\s*"(recipe|mode)":')


@dataclass(frozen=True)
class Located:
    """The model, as far as it was found, and the notes on what Accelerate was asked for."""

    source: str | None
    folder: RunFolder  # of the run to come
    notes: tuple[str, ...]


def check_before_torch(checks: Checks, resolved: Resolved, *, shipped: Path, cores: int, trains: bool) -> Located:
    """Check packages, report=PATH, Accelerate's flags, the model's config.json and local data; if it `trains`, the run
    folder too."""
    recipe, folder = resolved.recipe, run_folder(resolved.recipe, resolved.name)  # once: its name holds the time
    checks.add("packages", check_packages)
    if resolved.report:
        own = folder.report if resolved.mode == "train" else None
        checks.add("report", partial(check_report, resolved.report, own=own))
    notes = checks.add(
        "launch",
        partial(check_launch_flags, recipe.model, recipe.train, cores=cores),
        found=lambda notes: "; ".join(notes) or "nothing is asked for without effect",
    )
    source = checks.add("model", partial(check_located, recipe, shipped))
    if recipe.lora.start_from and not (trains and goes_on(recipe, resolved.name)):
        checks.add("adapter", partial(check_start, recipe.lora))
    for entry in recipe.data.sources:
        checks.add("data", partial(check_data, entry))
    if recipe.data.validation_source:
        checks.add("validation data", partial(check_data, recipe.data.validation_source, validates=True))
    if trains:
        checks.add("run folder", partial(check_run_folder, recipe, folder))
    return Located(source, folder, notes or ())


def check_packages() -> str:
    """Raise RecipeError unless every package is there, in a version that is supported."""
    if unfit := list(unfit_packages()):
        names = " ".join(f"'{requirement}'" for requirement, _ in unfit)
        found = ", ".join(f"{requirement.name} {found}" for requirement, found in unfit)
        raise RecipeError(f"packages must have supported versions; {found}.\npip install {names}")
    return "versions are supported"


def check_report(path: Path, *, own: Path | None = None) -> str:
    """Raise RecipeError if report=PATH cannot be written, names a file that is no report, or lies in a run's folder:
    a slip would lose what is there. `own`: the report of the run to come, which is written anyway."""
    check_output("report=PATH", path, REPORT_BEGIN, kind="report")
    if path != own and any((path.parent / name).is_file() for name in ("metrics.jsonl", "status.json")):
        raise RecipeError(f"report=PATH must not be in a run's folder; {path.parent} is one. Choose another folder.")
    return str(path)


def check_output(key: str, path: Path, begin: re.Pattern[bytes], *, kind: str) -> None:
    """Raise RecipeError if the file that `key` names cannot be written, or would replace what is neither empty nor an
    earlier one of its `kind`, told by how it begins; a pipe or a device is neither."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise RecipeError(f"{key} must be a file in a folder that can be written; {path} is not.")
    if not os.path.lexists(path):
        return
    content = None
    if path.is_file() and os.access(path, os.R_OK):
        with open(path, "rb") as file:  # which may be large
            content = file.read(200)
    if content is None or (content and not begin.match(content)):
        raise RecipeError(f"{key} must be a new file or an earlier {kind}; {path} is neither. Choose another.")


def check_located(recipe: Recipe, shipped: Path) -> str:
    """Where the model is. Raises RecipeError where that is nowhere, or where it cannot be trained, as far as its
    config.json tells (if this machine has it)."""
    source = locate(recipe.model, shipped / "architectures")
    if file := config_file(source, recipe.model.revision):
        check_config_file(
            file,
            max_length=recipe.data.max_length,
            auto=recipe.model.family == "auto",
            quant=recipe.quant if recipe.model.init == "pretrained" else None,
        )
    return source


def check_data(source: Source, *, validates: bool = False) -> str:
    """Raise DataError for local data that is not there or cannot be read, RecipeError for columns that none has."""
    reshape_of(source, 0)
    files = local_files(source, validates=validates).files
    if locked := [file for file in files if not os.access(file, os.R_OK)]:
        raise DataError(
            f"{source.path}: data must be readable; {locked[0]} is not ({len(locked)} of {len(files)} files).\n"
            "Give this user the permission to read it."
        )
    return f"{source.path}: {len(files)} file(s)" if files else f"{source.path}: a dataset of the hub"


def check_run_folder(recipe: Recipe, folder: RunFolder) -> str:
    """Raise CheckpointError or RecipeError if the `folder` of a run is taken or cannot be made."""
    if recipe.run.rescue_dir:
        try:
            writable(Path(recipe.run.rescue_dir).absolute())
        except OSError as error:
            raise RecipeError(
                f"run.rescue_dir must be a folder that can be written; {recipe.run.rescue_dir}: {error.strerror}."
            ) from None
    try:
        folder.check(resume=recipe.run.resume)
    except CheckpointError as error:
        error.reporter = 0  # every rank of this machine finds it
        raise
    return str(folder.path)


def goes_on(recipe: Recipe, name: str) -> bool:
    """Whether the run takes its weights from a checkpoint of its folder, as far as names tell."""
    return recipe.run.resume != "never" and any(run_folder(recipe, name).path.glob("checkpoints/step-*"))


def run_folder(recipe: Recipe, name: str) -> RunFolder:
    """Where a run of the recipe `name` would write, started now."""
    run = recipe.run
    return RunFolder(Path(run.output_dir or named_folder(run.resume) or default_folder(name)).absolute())
