"""A run that was ended anywhere goes on as if nothing had happened: the same metrics, the same adapter, bit for bit."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.bundle import bundles_of, step_of
from launcher.checkpoint.folder import RunFiles
from launcher.data import stream
from launcher.errors import CheckpointError
from launcher.records.run import RunOpened, RunRecord
from launcher.runtime.signals import listening
from tests.support.runs import adapter, lines, trained

pytestmark = pytest.mark.usefixtures("clean_dynamo")

MakeRecipe = Callable[..., Any]


@pytest.mark.parametrize(
    ("sections", "until"),
    [
        ({"lora": {"dropout": 0.2}}, 5),
        ({"data": {"batching": "bucketed"}, "train": {"optimizer": "adamw_8bit"}, "lora": {"r": 64}}, 6),
        ({"data": {"batching": "padded"}, "model": {"dtype": "float16"}}, 3),
        ({"data": {"streaming": True, "validation": 0}, "compile": {"mode": "strict"}}, 7),
        ({"train": {"log_every": 3}}, 7),
    ],
)
def test_a_run_that_is_killed_and_started_again_leaves_what_an_uninterrupted_one_leaves(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: Any, until: int
) -> None:
    monkeypatch.setattr(stream, "WINDOW_BLOCKS", 4)
    trained(make("whole", **sections))
    trained(make(**sections), until=until)
    assert not (tmp_path / "run" / "adapter").exists()
    events = trained(make(**sections))
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    record = events[-1]
    assert isinstance(record, RunRecord)
    first, second = record.parts
    assert (first.first_step, second.last_step) == (1, 8)
    assert 2 <= first.last_step < until and second.first_step == first.last_step + 1
    assert first.lost_s > 0
    assert any(f"goes on from step {first.last_step}" in note for note in record.start.notes)
    assert [step.step for step in record.steps] == list(range(1, 9))


def test_every_checkpoint_keeps_the_newest_and_an_adapter_for_stock_peft(make: MakeRecipe, tmp_path: Path) -> None:
    from peft import PeftConfig

    trained(make(train={"keep": 3}))
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [step_of(path) for path in bundles_of(checkpoints)] == [8, 6, 4]
    saved = (checkpoints / "step-8" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert saved == adapter(tmp_path / "run")
    assert PeftConfig.from_pretrained(str(checkpoints / "step-8" / "adapter")).r == 4


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(make: MakeRecipe, killed: Path) -> None:
    with open(killed / "checkpoints" / "step-4" / "state.safetensors", "r+b") as file:
        file.truncate(1000)
    record = trained(make())[-1]
    assert isinstance(record, RunRecord)
    [note] = [note for note in record.start.notes if "must be whole" in note]
    assert "step-4 is not: state.safetensors was changed. step-2 is used." in note
    assert record.parts[1].first_step == 3


def test_a_named_checkpoint_is_gone_on_from_and_those_after_it_go(make: MakeRecipe, killed: Path) -> None:
    recipe = make(run={"output_dir": None, "resume": str(killed / "checkpoints" / "step-2")})
    record = trained(recipe)[-1]
    assert isinstance(record, RunRecord)
    assert record.parts[1].first_step == 3
    assert record.start.run_dir == str(killed)
    assert [line["step"] for line in lines(killed)] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8]


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"train": {"lr": 2e-3}}, "train.lr: 0.001 in the state, 0.002 here"),
        ({"data": {"max_length": 32}}, "data.max_length: 64 in the state, 32 here"),
        ({"train": {"seed": 1}}, "train.seed: 0 in the state, 1 here"),
        ({"run": {"resume": "never"}}, "must not hold another run"),
    ],
)
def test_another_recipe_is_refused_with_code_4_and_the_checkpoints_stay(
    make: MakeRecipe, killed: Path, sections: Any, says: str
) -> None:
    before = lines(killed)
    with pytest.raises(CheckpointError, match=says) as caught:
        trained(make(**sections))
    assert caught.value.code == 4
    assert lines(killed) == before
    assert {path.name for path in killed.iterdir()} == {"checkpoints", "metrics.jsonl"}
    assert [step_of(path) for path in bundles_of(killed / "checkpoints")] == [4, 2]


def test_a_finished_run_goes_on_with_more_steps_and_is_else_refused(make: MakeRecipe, tmp_path: Path) -> None:
    trained(make())
    with pytest.raises(CheckpointError, match=r"has steps left; .* has done 8 of 8"):
        trained(make())
    trained(make(train={"steps": 10}))
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == list(range(1, 11))


def test_nothing_is_saved_where_it_is_not_wanted(make: MakeRecipe, tmp_path: Path) -> None:
    trained(make(train={"save_every": 0}))
    assert not (tmp_path / "run" / "checkpoints").exists()
    with listening(), pytest.raises(KeyboardInterrupt, match="^$"):
        trained(make("other", train={"save_every": 0}), until=3, act=lambda: os.kill(os.getpid(), signal.SIGINT))


def test_the_status_says_whether_a_run_can_go_on(make: MakeRecipe, killed: Path) -> None:
    files = RunFiles(0)
    files.show(RunOpened(killed))
    files.end(code=143, reason="terminated")
    assert json.loads((killed / "status.json").read_text())["resumable"] is True
    shutil.rmtree(killed / "checkpoints")
    files.end(code=5, reason="nan")
    assert json.loads((killed / "status.json").read_text())["resumable"] is False
