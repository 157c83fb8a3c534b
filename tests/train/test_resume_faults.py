"""Faults around checkpoints: kills, signals, foreign files; what each leaves, and how the run goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint import bundle as bundles
from launcher.errors import CheckpointError
from launcher.records.run import RunRecord
from launcher.train import finish
from launcher.train.checkpoints import SaveSchedule
from tests.support.runs import lines, trained

pytestmark = pytest.mark.usefixtures("clean_dynamo")

MakeRecipe = Callable[..., Any]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew_and_keeps_its_metrics_aside(
    make: MakeRecipe, tmp_path: Path
) -> None:
    trained(make(train={"save_every": "1h"}), until=3)
    (tmp_path / "run" / "checkpoints" / "step-1.part").mkdir(parents=True)
    before = lines(tmp_path / "run")
    trained(make())
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == list(range(1, 9))
    aside = [json.loads(line) for line in (tmp_path / "run" / "metrics.earlier.jsonl").read_text().splitlines()]
    assert [line["step"] for line in aside] == [line["step"] for line in before] == [0, 1, 2, 3]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.part"))


@pytest.mark.parametrize("mode", ["off", "strict"])
def test_a_run_that_was_killed_after_its_last_checkpoint_still_leaves_its_adapter(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    recipe = make(compile={"mode": mode})
    with monkeypatch.context() as patch:
        patch.setattr(finish, "save_proven", lambda *_, **__: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            trained(recipe)
    record = trained(recipe)[-1]
    assert isinstance(record, RunRecord) and all(verdict.holds for verdict in record.verdicts)
    assert "every step ran compiled" not in [verdict.claim for verdict in record.verdicts]  # there was none
    assert (tmp_path / "run" / "adapter").exists()


def test_a_finished_run_that_dies_after_its_added_steps_goes_on(make: MakeRecipe, tmp_path: Path) -> None:
    trained(make())
    trained(make(train={"steps": 10}), until=10)
    trained(make(train={"steps": 10}))
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == list(range(1, 11))
    with pytest.raises(CheckpointError, match="has done 10 of 6"):
        trained(make(train={"steps": 6}))


@pytest.mark.parametrize("changed", ["part", "state", "run"])
def test_a_checkpoint_of_another_version_is_refused_and_nothing_changes(
    make: MakeRecipe, killed: Path, changed: str
) -> None:
    state = bundles.read_bundle(killed / "checkpoints" / "step-4")
    {"part": state["run"]["parts"][0], "state": state["state"], "run": state["run"]}[changed]["later"] = 1
    bundles.write_bundle(killed / "checkpoints", state, step=4, adapter=lambda folder: folder.mkdir())
    before = lines(killed)
    with pytest.raises(CheckpointError, match="written by this version"):
        trained(make())
    assert lines(killed) == before


@pytest.mark.parametrize("line", ['{"step": "3", "eval_loss": 1.0}', '{"step": [1]}', '{"step": 3, "lo', "null", "7"])
def test_a_line_that_is_no_record_is_left_out(make: MakeRecipe, killed: Path, line: str) -> None:
    with open(killed / "metrics.jsonl", "a") as file:
        file.write(line)
    trained(make())
    assert [record["step"] for record in lines(killed)] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8]


def test_lost_metrics_are_said_and_no_evaluation_is_invented(make: MakeRecipe, killed: Path) -> None:
    (killed / "metrics.jsonl").unlink()
    record = trained(make())[-1]
    assert isinstance(record, RunRecord)
    assert any("lacks 4 of the 4 steps" in note for note in record.start.notes)
    assert [line["step"] for line in lines(killed)] == [5, 6, 7, 8, 8]


def test_a_path_that_is_no_run_is_refused_and_makes_nothing(make: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="which is no folder; checkpoints there: none"):
        trained(make(run={"output_dir": None, "resume": str(tmp_path / "typo")}))
    assert not (tmp_path / "typo").exists()


def test_the_time_of_the_next_save_is_looked_at_soon_whatever_the_first_step_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("launcher.train.checkpoints.time.monotonic", lambda: now)
    monkeypatch.setattr("launcher.train.checkpoints.broadcast", lambda value: value)
    schedule, saves = SaveSchedule("10m", step=0), []
    for step in range(1, 400):
        now += 0.05 if step < 3 else 6.0
        if schedule.due(step):
            saves.append(now)
    gaps = [later - earlier for earlier, later in zip([0.0, *saves], saves, strict=False)]
    assert len(saves) >= 2 and all(600 <= gap < 1200 for gap in gaps)
