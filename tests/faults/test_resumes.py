"""A run goes on with other processes only if that is allowed, and with other data or another recipe never."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.bundle import bundles_of, read_bundle, step_of
from launcher.errors import CheckpointError
from launcher.recipe.load import resolve
from launcher.records.run import RunRecord, StepRecord
from tests.support.arguments import replaced
from tests.support.launches import LAUNCH, MAIN, succeeded
from tests.support.runs import lines, trained

pytestmark = pytest.mark.usefixtures("clean_dynamo")

MakeRecipe = Callable[..., Any]
ALLOWED = {"run": {"allow_reshard": True}}


def losses(events: list[Any]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepRecord)]


def notes(events: list[Any]) -> str:
    [record] = [event for event in events if isinstance(event, RunRecord)]
    return "\n".join(record.start.notes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fault_31_a_checkpoint_under_the_name_of_another_step_is_refused(make: MakeRecipe, killed: Path) -> None:
    """Its steps would be counted from the wrong one."""
    (killed / "checkpoints" / "step-4").rename(killed / "checkpoints" / "step-5")
    before = contents(killed)
    with pytest.raises(CheckpointError, match="step-5 holds step 4.\nRename it to step-4") as caught:
        trained(make())
    assert caught.value.code == 4 and contents(killed) == before


def test_fault_32_a_step_that_is_cut_otherwise_is_refused_unless_that_is_allowed(
    make: MakeRecipe, killed: Path
) -> None:
    whole = losses(trained(make("whole")))
    before = contents(killed)
    halves = {"micro_batch": 1, "accumulation": 2}
    says = r"train.micro_batch: 2 in the state, 1 here\n.*accumulation: 1 in .*, 2 here\nSet run.allow_reshard=true"
    with pytest.raises(CheckpointError, match=says) as caught:
        trained(make(train=halves))
    assert caught.value.code == 4 and contents(killed) == before
    with pytest.raises(CheckpointError, match="train.lr: ") as caught:  # what else differs is never allowed
        trained(make(train={**halves, "lr": 0.5}, **ALLOWED))
    assert "Set run" not in str(caught.value) and contents(killed) == before
    events = trained(make(train=halves, **ALLOWED))
    assert losses(events) == pytest.approx(whole[4:], rel=1e-6)
    assert whole[4:] != pytest.approx(whole[:4], rel=1e-6)
    assert "goes on with train.micro_batch 1 in place of 2, train.accumulation 2 in place of 1; each step has" in notes(
        events
    )


def test_fault_32_a_step_of_another_size_goes_on_where_the_data_was_and_says_what_is_left_out(
    make: MakeRecipe, killed: Path
) -> None:
    """Four steps of two blocks are eight blocks: two and two thirds steps of three."""
    allowed = {"run": {"allow_reshard": True, "output_dir": None, "resume": str(killed / "checkpoints" / "step-4")}}
    events = trained(make(train={"micro_batch": 3, "steps": 6}, **allowed))
    assert "a step has 3 blocks in place of 2; blocks left out to begin at a whole step: 1" in notes(events)
    assert read_bundle(killed / "checkpoints" / "step-6")["state"]["loader"] == {"epoch": 0, "offset": 5}
    assert [line["step"] for line in lines(killed) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(
        CheckpointError, match="(?s)must keep the blocks of a step.*3 in the state, 2 here.*train.steps"
    ):
        trained(make(train={"steps": None, "epochs": 9}, **ALLOWED))


def test_fault_32_bucketed_data_cannot_be_cut_anew_within_an_epoch_and_nothing_changes(
    make: MakeRecipe, tmp_path: Path
) -> None:
    bucketed = {"data": {"batching": "bucketed"}}
    trained(make(**bucketed), until=6)
    before = contents(tmp_path / "run")
    with pytest.raises(CheckpointError, match="depends on train.micro_batch"):
        trained(make(**bucketed, train={"micro_batch": 1, "accumulation": 2}, **ALLOWED))
    assert contents(tmp_path / "run") == before


@pytest.mark.faults
def test_fault_32_from_one_process_to_two_and_back_with_the_losses_of_one(
    small_arguments: tuple[str, ...], tmp_path: Path
) -> None:
    common = replaced(
        small_arguments, "compile.mode=off", "train.steps=6", "train.save_every=2", "train.keep=9",
        "run.sample_tokens=0", "model.dtype=float32",
    )  # fmt: skip
    alone = [*common, "train.micro_batch=1", "train.accumulation=2"]
    folder = tmp_path / "run"
    whole = losses(trained(resolve([*alone, f"run.output_dir={tmp_path / 'whole'}"]).recipe))
    trained(resolve([*alone, f"run.output_dir={folder}"]).recipe, until=4)
    shutil.rmtree(folder / "checkpoints" / "step-4", ignore_errors=True)
    spread = [*common, "train.micro_batch=1", f"run.output_dir={folder}"]
    succeeded(*LAUNCH, MAIN, *spread, "run.allow_reshard=true", cwd=tmp_path)
    assert [line["loss"] for line in lines(folder) if "loss" in line] == pytest.approx(whole, rel=1e-6)
    report = json.loads((folder / "report.json").read_text())
    assert [part["first_step"] for part in report["parts"]] == [1, 3] and len(report["ranks"]) == 2
    assert any("processes 2 in place of 1; each step has the blocks" in note for note in report["start"]["notes"])
    assert any("no random state was saved for rank 1" in note for note in report["start"]["notes"])
    assert list(read_bundle(folder / "checkpoints" / "step-4")["state"]["random"]) == ["0", "1"]
    back = [*alone, f"run.resume={folder / 'checkpoints' / 'step-4'}", "run.allow_reshard=true"]
    assert losses(trained(resolve(back).recipe)) == pytest.approx(whole[4:], rel=1e-6)
    assert [line["loss"] for line in lines(folder) if "loss" in line] == pytest.approx(whole, rel=1e-6)


def test_fault_33_other_data_or_another_recipe_is_refused_naming_every_key_and_nothing_changes(
    make: MakeRecipe, killed: Path, rows_file: Path, tmp_path: Path
) -> None:
    rows = rows_file.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "shorter.jsonl").write_text("".join(rows[:30]), encoding="utf-8")
    (tmp_path / "same.jsonl").write_text("".join(rows), encoding="utf-8")
    before = contents(killed)
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"train": {"lr": 2e-3}}, ["train.lr: 0.001 in the state, 0.002 here"]),
        ({"train": {"seed": 1}}, ["train.seed: 0 in the state, 1 here"]),
        ({"train": {"optimizer": "adamw_8bit"}}, ["train.optimizer: 'adamw' in the state, 'adamw_8bit' here"]),
        (
            {"train": {"schedule_options": {"num_cycles": 1}}},
            ["train.schedule_options: missing in the state, {'num"],
        ),
        ({"lora": {"r": 8, "dropout": 0.1}}, ["lora.r: 4 in the state, 8 here", "lora.dropout: 0.0 in the state, 0.1"]),
        ({"data": {"max_length": 48}}, ["data.max_length: 64 in the state, 48 here"]),
        ({"data": {"batching": "padded"}}, ["data.batching: 'packed' in the state, 'padded' here"]),
        ({"data": {"sources": [{"path": str(tmp_path / "shorter.jsonl")}]}}, ["data: '"]),
        ({"model": {"dtype": "bfloat16"}}, ["dtype: 'float32' in the state, 'bfloat16' here"]),
        ({"quant": {"double": False}}, ["quant.double: True in the state, False here"]),
    ]
    for sections, differences in cases:
        with pytest.raises(CheckpointError) as caught:
            trained(make(**sections))
        assert caught.value.code == 4
        assert all(difference in str(caught.value) for difference in differences), caught.value
        assert len(str(caught.value).splitlines()) == 2 + len(differences), "what follows from them is left out"
        assert not re.search("[0-9a-f]{20}", str(caught.value)), "of a digest the beginning"
        assert contents(killed) == before
    trained(make(data={"sources": [{"path": str(tmp_path / "same.jsonl")}]}))  # the same data in another place
    assert step_of(bundles_of(killed / "checkpoints")[0]) == 8
