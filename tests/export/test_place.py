"""Which folders are a run's, and what is known of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import RecipeError
from launcher.export.place import find_run


@pytest.fixture
def copied(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "copied"))


def changed(folder: Path, **sections: dict[str, Any]) -> None:
    report = json.loads((folder / "report.json").read_text())
    for name, values in sections.items():
        report["recipe"][name] |= values
    (folder / "report.json").write_text(json.dumps(report))


def test_a_run_is_found_by_its_folder_a_checkpoint_or_an_adapter(run_folder: Path) -> None:
    bundle = run_folder / "checkpoints" / "step-4"
    expected = {
        run_folder: run_folder / "adapter",
        run_folder / "adapter": run_folder / "adapter",
        bundle: bundle / "adapter",
        bundle / "adapter": bundle / "adapter",
    }
    for path, adapter in expected.items():
        place = find_run(path)
        assert (place.folder, place.adapter, place.finished, place.notes) == (run_folder, adapter, True, ())
        assert place.checkpoint_step == (4 if bundle in adapter.parents else None)
        assert place.recipe.lora.r == 32 and place.dtype == "float32"


def test_an_unfinished_run_is_known_from_its_newest_checkpoint(copied: Path) -> None:
    finished = find_run(copied)
    shutil.rmtree(copied / "adapter")
    (copied / "report.json").unlink()
    place = find_run(copied)
    assert place.adapter == copied / "checkpoints" / "step-8" / "adapter" and "step-8" in place.notes[0]
    assert not place.finished and place.dtype == finished.dtype
    for section in ("model", "quant", "lora"):
        assert getattr(place.recipe, section) == getattr(finished.recipe, section)


@pytest.mark.parametrize("of", ["report", "checkpoint"])
def test_random_weights_exist_nowhere(copied: Path, of: str) -> None:
    changed(copied, model={"init": "random"})
    if of == "checkpoint":
        (copied / "report.json").unlink()
        for file in copied.glob("checkpoints/*/state.json"):
            file.write_text(file.read_text().replace('"pretrained"', '"random"'))
    with pytest.raises(RecipeError, match="random weights"):
        find_run(copied)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "must be whole"),
        ("[]", "holds no object"),
        ('{"recipe": {"model": 3}}', "of this version"),
        ("{}", "this version"),
    ],
)
def test_a_report_that_is_none_is_refused(copied: Path, content: str, says: str) -> None:
    (copied / "report.json").write_text(content)
    with pytest.raises(RecipeError, match=says):
        find_run(copied)


def test_an_adapter_without_its_run_is_told_where_to_load_it(copied: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(copied / "adapter", tmp_path / "elsewhere" / "adapter"))
    with pytest.raises(RecipeError, match="docs/adapter.md"):
        find_run(alone)


def test_an_adapter_is_not_taken_for_that_of_a_run_around_it(copied: Path) -> None:
    (copied / "adapter").rename(copied / "anothers")
    with pytest.raises(RecipeError, match="docs/adapter.md"):
        find_run(copied / "anothers")


def test_a_mistyped_run_is_told_the_runs_beside_it(copied: Path) -> None:
    with pytest.raises(RecipeError, match=f"is no folder.\nThere are {copied}"):
        find_run(copied.with_name("copeid"))
