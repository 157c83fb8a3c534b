"""What can be refused before torch is imported, which takes 8 seconds to a minute. Imports no torch."""

from pathlib import Path

from launcher.checkpoint.folder import RunFolder, default_folder
from launcher.data.read.sources import local_files
from launcher.errors import CheckpointError
from launcher.model.config_file import check_config_file
from launcher.recipe.schema import Recipe


def check_inputs(recipe: Recipe, config_file: Path | None) -> None:
    """Raise RecipeError for a model that cannot be trained, as far as its config.json tells (None: there is none on
    this machine), and DataError for local data that is not there."""
    if config_file:
        check_config_file(config_file, max_length=recipe.data.max_length)
    for source in recipe.data.sources:
        local_files(source)
    if recipe.data.validation_source:
        local_files(recipe.data.validation_source, validates=True)


def check_run_folder(recipe: Recipe, name: str) -> None:
    """Raise CheckpointError or RecipeError if the folder of a run of the recipe `name` is taken or cannot be made."""
    try:
        RunFolder(Path(recipe.run.output_dir or default_folder(name)).absolute()).check()
    except CheckpointError as error:
        error.reporter = 0  # every rank of this machine finds it
        raise
