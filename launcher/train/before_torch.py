"""What can be refused before torch is imported, which takes 8 seconds to a minute. Imports no torch."""

import os
import re
from pathlib import Path

from launcher.checkpoint.files import writable
from launcher.checkpoint.folder import RunFolder, default_folder, named_folder
from launcher.data.read.sources import local_files
from launcher.errors import CheckpointError, RecipeError
from launcher.model.config_file import check_config_file
from launcher.recipe.schema import Recipe

REPORT_BEGIN = re.compile(rb'\{\s*"schema": \d+,\s*"(recipe|mode)":')


def check_inputs(recipe: Recipe, config_file: Path | None) -> None:
    """Raise RecipeError for a model that cannot be trained, as far as its config.json tells (None: there is none on
    this machine), and DataError for local data that is not there."""
    if config_file:
        check_config_file(config_file, max_length=recipe.data.max_length)
    for source in recipe.data.sources:
        local_files(source)
    if recipe.data.validation_source:
        local_files(recipe.data.validation_source, validates=True)


def check_report(path: Path) -> None:
    """Raise RecipeError if report=PATH cannot be written, or names a file that is no report: a slip would lose it."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise RecipeError(f"report=PATH must be a file in a folder that can be written; {path} is not.")
    if os.path.lexists(path) and not _may_replace(path):
        raise RecipeError(f"report=PATH must be a new file or an earlier report; {path} is neither. Choose another.")


def _may_replace(path: Path) -> bool:
    """Whether a path names an empty file or a report; a pipe or a device is neither."""
    if not path.is_file() or not os.access(path, os.R_OK):
        return False
    with open(path, "rb") as file:  # which may be large
        begin = file.read(200)
    return not begin or REPORT_BEGIN.match(begin) is not None


def check_run_folder(recipe: Recipe, name: str) -> None:
    """Raise CheckpointError or RecipeError if the folder of a run of the recipe `name` is taken or cannot be made."""
    run = recipe.run
    folder = RunFolder(Path(run.output_dir or named_folder(run.resume) or default_folder(name)).absolute())
    if run.rescue_dir:
        try:
            writable(Path(run.rescue_dir).absolute())
        except OSError as error:
            raise RecipeError(
                f"run.rescue_dir must be a folder that can be written; {run.rescue_dir}: {error.strerror}."
            ) from None
    try:
        folder.check(resume=run.resume)
    except CheckpointError as error:
        error.reporter = 0  # every rank of this machine finds it
        raise
