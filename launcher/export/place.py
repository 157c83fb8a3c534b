"""Where a run's adapter is, and what it was trained with. Imports no torch: a wrong folder is answered at once."""

import importlib.util
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version
from pydantic import ValidationError

from launcher.checkpoint.files import damaged, read_object, writable
from launcher.checkpoint.folder import RunFolder, bundles_of, run_folder_of
from launcher.errors import LauncherError, RecipeError
from launcher.recipe.lora_section import LoraSection
from launcher.recipe.schema import Recipe

UNPROVEN_SUFFIX = ".unproven"  # of a folder whose proof failed
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
QUANTIZE_TOOL = "llama-quantize"  # llama.cpp's
READS_GGUF = "5.18"  # the first version of Transformers that reads the special tokens of a GGUF file
IDENTITY_SECTIONS = ("model", "quant", "lora", "data")


@dataclass(frozen=True)
class RunPlace:
    """A run, and one of its adapters."""

    folder: Path  # of the run
    adapter: Path
    recipe: Recipe  # resolved; of an unfinished run only what decides the model
    dtype: str  # the compute dtype of the run
    finished: bool  # whether the recipe is whole: the report has been written
    notes: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)  # of a finished run's data
    eval_loss: float | None = None  # of this adapter on the run's validation data, as the run measured it

    @property
    def checkpoint_step(self) -> int | None:
        """The step of the checkpoint whose adapter this is; None of the adapter that the run saved."""
        step = self.adapter.parent.name.removeprefix("step-")
        return int(step) if self.adapter.parent != self.folder and step.isdecimal() else None


def find_run(path: Path) -> RunPlace:
    """The run of a run's folder, of a checkpoint's or of an adapter's.

    Raises RecipeError: it is none, it has no adapter, or its base has random weights, which exist nowhere.
    """
    folder, adapter, notes = _folder_and_adapter(path.expanduser().absolute())
    has_report = (folder / "report.json").is_file() and not RunFolder(folder).has_unfinished_report
    report = read_object(folder / "report.json") if has_report else None
    recipe, dtype = _of_report(report, folder) if report is not None else _of_checkpoint(folder, adapter)
    if recipe.model.init == "random":
        raise RecipeError(
            f"a run whose model is to be used must have a base; that of {folder} had random weights "
            "(model.init=random), which exist nowhere.\nTrain on a checkpoint: model.init=pretrained."
        )
    counts, eval_loss = (report or {}).get("data", {}), _eval_loss(folder, adapter, report or {})
    finished = report is not None
    return RunPlace(folder, adapter, recipe, dtype, finished=finished, notes=notes, counts=counts, eval_loss=eval_loss)


def first_start(lora: LoraSection) -> str:
    """lora.init of the run with which a row of runs began, each from the adapter of the one before: as far back as
    their folders are here."""
    seen = set[str]()
    while lora.start_from and lora.start_from not in seen:
        seen.add(lora.start_from)
        try:
            lora = find_run(Path(lora.start_from)).recipe.lora
        except LauncherError:  # an adapter without a run, or of the hub
            break
    return lora.init


def check_target(to: Path) -> None:
    """Raise RecipeError where `to` or its .unproven is taken, or cannot be made; makes nothing."""
    aside = to.with_name(to.name + UNPROVEN_SUFFIX)
    if os.path.lexists(to) and not (to.is_dir() and not any(to.iterdir())):
        raise RecipeError(f"to must be a new or an empty folder; {to} is not.\nName another, or remove it.")
    if os.path.lexists(aside):
        raise RecipeError(
            f"to must be a new or an empty folder; {aside} is there already.\nName another, or remove it."
        )
    try:
        writable(to.parent)
    except OSError as error:
        raise RecipeError(f"to must be a folder that can be made; {to}: {error.strerror}.\nName another.") from None


def check_gguf(quantization: str) -> None:
    """Raise RecipeError unless what writes a GGUF file of that kind is installed."""
    if importlib.util.find_spec("gguf") is None:
        raise RecipeError("format=gguf needs the package gguf, which is not installed.\nRun: pip install 'gguf>=0.19'")
    found = metadata.version("transformers")
    if Version(found) < Version(READS_GGUF):
        raise RecipeError(
            "format=gguf is proved by what Transformers reads from the file; before "
            f"{READS_GGUF} it reads another end token than is there. {found} is installed.\n"
            f"Run: pip install 'transformers>={READS_GGUF}', or use format=merged."
        )
    if "_k" in quantization and shutil.which(QUANTIZE_TOOL) is None:
        raise RecipeError(
            f"quantization={quantization} needs llama.cpp's {QUANTIZE_TOOL} on PATH; it is not there.\n"
            "Build it (cmake -B build && cmake --build build -t llama-quantize), or use quantization=q8_0."
        )


def _folder_and_adapter(path: Path) -> tuple[Path, Path, tuple[str, ...]]:
    """The run's folder, the adapter's folder, and what to say of the choice."""
    folder = run_folder_of(path) or path
    for adapter in (path, path / "adapter"):
        if _is_adapter(adapter):
            return folder, adapter, ()
    for bundle in bundles_of(path / "checkpoints"):
        if _is_adapter(bundle / "adapter"):
            note = f"the run has no adapter of its end: that of its newest checkpoint, {bundle.name}, is used"
            return folder, bundle / "adapter", (note,)
    found = "a folder without an adapter" if path.is_dir() else "no folder"
    beside = {str(run.parent) for run in path.parent.glob("*/report.json")} if path.parent.is_dir() else set()
    runs = sorted(beside - {str(path)})[-3:]
    raise RecipeError(
        f"run must be the folder of a run that saved an adapter, of one of its checkpoints, or of the adapter; "
        f"{path} is {found}." + (f"\nThere are {', '.join(runs)}." if runs else "")
    )


def _is_adapter(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ADAPTER_FILES)


def _of_report(report: dict[str, Any], folder: Path) -> tuple[Recipe, str]:
    try:
        return Recipe.model_validate(report["recipe"]), str(report["start"]["dtype"])
    except (ValidationError, KeyError, TypeError) as error:
        raise damaged(folder / "report.json", str(error).splitlines()[0]) from None


def _of_checkpoint(folder: Path, adapter: Path) -> tuple[Recipe, str]:
    """From the state of the checkpoint that the adapter is of, or of the run's newest."""
    bundles = [
        bundle for bundle in (adapter.parent, *bundles_of(folder / "checkpoints")) if (bundle / "state.json").is_file()
    ]
    if not bundles:
        raise RecipeError(
            "run must be a run's folder, or lie in one: its recipe is in report.json or in a checkpoint; "
            f"{folder} has neither.\nLoad an adapter without its run in stock code: docs/adapter.md."
        )
    identity = read_object(bundles[0] / "state.json").get("state", {}).get("identity", {})
    sections: dict[str, dict[str, Any]] = {"train": {"steps": 1, "seed": identity.get("train.seed", 0)}}
    for section in IDENTITY_SECTIONS:
        keys = {key: value for key, value in identity.items() if key.startswith(f"{section}.")}
        sections[section] = {key.partition(".")[2]: value for key, value in keys.items()}
    return _of_report({"recipe": sections, "start": {"dtype": identity.get("dtype")}}, folder)


def _eval_loss(folder: Path, adapter: Path, report: dict[str, Any]) -> float | None:
    """That of the adapter which the run saved, or of the step whose checkpoint the adapter is of."""
    if adapter.parent == folder:
        found, recipe = report.get("loss", {}), report.get("recipe", {})
        last: float | None = None if recipe.get("train", {}).get("keep_best") else found.get("eval_last")
        return found.get("eval_adapter", last)  # which reports of an earlier day lack
    losses: dict[str, float] = {}
    with suppress(OSError, ValueError):  # the folder may have been copied without it, or be written to
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            if "eval_loss" in (record := json.loads(line)):
                losses[f"step-{record['step']}"] = record["eval_loss"]
    return losses.get(adapter.parent.name)
