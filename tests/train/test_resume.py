"""A run that was ended anywhere goes on as if nothing had happened: the same metrics, the same adapter, bit for bit."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.bundle import bundles_of, read_bundle, step_of
from launcher.checkpoint.run_files import RunFiles
from launcher.data import stream
from launcher.errors import CheckpointError
from launcher.records.run import RunOpened, RunRecord, StepRecord
from launcher.runtime.signals import listening
from launcher.train.history import RunHistory
from launcher.train.loop import training
from tests.conftest import request_for
from tests.support.runs import adapter, lines, trained
from tests.support.states import flat

pytestmark = pytest.mark.usefixtures("clean_dynamo")

MakeRecipe = Callable[..., Any]


def saved_state(folder: Path) -> dict[str, Any]:
    """Everything in the checkpoint of the last step, bit for bit."""
    return flat(read_bundle(bundles_of(folder / "checkpoints")[0])["state"])


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


WEIGHTED = "weighted"  # in place of sources: two, the second one three times as often


@pytest.mark.parametrize(
    ("sections", "ends"),
    [
        ({"lora": {"dropout": 0.2}, "train": {"eval_every": 2, "keep_best": True}}, [5]),
        ({"lora": {"dropout": 0.2}, "train": {"save_every": 1}}, [2]),  # only the very first step is saved
        ({"data": {"batching": "bucketed"}, "train": {"optimizer": "adamw_8bit"}, "lora": {"r": 64}}, [6]),
        ({"data": {"batching": "padded"}, "model": {"dtype": "float16"}, "train": {"log_every": 3}}, [3]),
        (
            {"train": {"optimizer": "schedule_free_adamw", "schedule": "constant", "eval_every": 1, "keep_best": True}},
            [5],
        ),
        ({"data": {"streaming": True, "validation": 0}, "compile": {"mode": "strict"}}, [7]),
        ({"data": {"sources": WEIGHTED, "streaming": True, "validation": 0}, "model": {"dtype": "float16"}}, [3, 7]),
        ({"data": {"sources": WEIGHTED}, "train": {"log_every": 3}, "lora": {"dropout": 0.2}}, [4, 8]),
    ],
)
def test_a_run_that_is_killed_and_started_again_leaves_what_an_uninterrupted_one_leaves(
    make: MakeRecipe, tmp_path: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch, sections: Any, ends: list[int]
) -> None:
    monkeypatch.setattr(stream, "WINDOW_BLOCKS", 4)
    if sections.get("data", {}).get("sources") == WEIGHTED:
        sources = [{"path": str(rows_file), "weight": weight} for weight in (1, 3)]
        sections = {**sections, "data": {**sections["data"], "sources": sources}}
    trained(make("whole", **sections))
    for end in ends:
        trained(make(**sections), until=end)
        assert not (tmp_path / "run" / "adapter").exists()
    events = trained(make(**sections))
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    assert saved_state(tmp_path / "run") == saved_state(tmp_path / "whole")
    record = events[-1]
    assert isinstance(record, RunRecord)
    *earlier, last = record.parts
    assert len(earlier) == len(ends) and (record.parts[0].first_step, last.last_step) == (1, 8)
    for part, following, end in zip(earlier, record.parts[1:], ends, strict=True):
        assert 1 <= part.last_step < end and following.first_step == part.last_step + 1
        assert part.lost_s > 0
    assert any(f"goes on from step {last.first_step - 1}" in note for note in record.start.notes)
    assert [step.step for step in record.steps] == list(range(1, 9))


def test_the_parts_tell_of_a_start_that_saved_nothing_and_of_all_seconds_lost(make: MakeRecipe, tmp_path: Path) -> None:
    """Nothing was saved by the first start, nor by the third, which went on from step 2."""
    seldom = {"train": {"save_every": "1h"}}
    trained(make(**seldom), until=3)
    trained(make(), until=3)
    trained(make(**seldom), until=5)
    done_again = [
        sum(json.loads(line).get("step_s", 0) for line in text.splitlines() if json.loads(line)["step"] > 2)
        for text in [(tmp_path / "run" / "metrics.jsonl").read_text()]
    ]
    record = trained(make())[-1]
    assert isinstance(record, RunRecord)
    assert [(part.first_step, part.last_step) for part in record.parts] == [(1, 0), (1, 2), (3, 2), (3, 8)]
    assert all(part.host for part in record.parts)
    lost = [part.lost_s for part in record.parts]
    assert lost[0] > 0 and lost[1] > 0 and lost[2] == pytest.approx(done_again[0]) and lost[3] == 0
    (tmp_path / "run" / "parts.json").write_text("torn")
    record = trained(make(train={"steps": 9}))[-1]
    assert isinstance(record, RunRecord)  # the checkpoint tells them too
    assert [(part.first_step, part.last_step) for part in record.parts[-2:]] == [(3, 8), (9, 9)]
    assert len(record.parts) == 5


def test_what_may_change_changes_no_step(make: MakeRecipe, tmp_path: Path) -> None:
    trained(make("whole"))
    trained(make(), until=5)
    trained(make(train={"eval_every": 3, "log_every": 2, "save_every": 3}), until=8)
    assert bundles_of(tmp_path / "run" / "checkpoints")[0].name == "step-6"
    other = {"compile": {"mode": "strict"}, "memory": {"activations": "full", "loss_chunk_mib": 1}}
    trained(make(**other))
    assert losses(tmp_path / "run")[:6] == losses(tmp_path / "whole")[:6]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert [line["step"] for line in lines(tmp_path / "run") if "eval_loss" in line] == [0, 4, 6, 8]


def test_with_more_epochs_the_data_goes_on(make: MakeRecipe, tmp_path: Path) -> None:
    steady = {"schedule": "constant", "warmup": 0, "steps": None, "micro_batch": 8}
    trained(make("whole", train={**steady, "epochs": 2}))
    trained(make(train={**steady, "epochs": 1}))
    first = len(losses(tmp_path / "run"))
    trained(make(train={**steady, "epochs": 2}))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and len(losses(tmp_path / "run")) == 2 * first > 2
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


def test_two_runs_on_the_same_data_at_once_do_not_meet(make: MakeRecipe, tmp_path: Path) -> None:
    trained(make("whole"))
    for recipe in (make("one"), make("other")):
        trained(recipe, until=5)
    running = [training(request_for(make(name)), RunHistory()) for name in ("one", "other")]
    steps: list[list[float]] = [[], []]
    for both in zip(*running, strict=True):
        for events, event in zip(steps, both, strict=True):
            if isinstance(event, StepRecord):
                events.append(event.loss)
    assert steps[0] == steps[1] == losses(tmp_path / "whole")[4:]


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


def test_with_resume_never_a_folder_with_checkpoints_is_refused(make: MakeRecipe, killed: Path) -> None:
    with pytest.raises(CheckpointError, match="must not hold another run"):
        trained(make(run={"resume": "never"}))
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
    with listening(), pytest.raises(KeyboardInterrupt, match="no checkpoint was saved"):
        trained(make("other", train={"save_every": 0}), until=3, act=lambda: os.kill(os.getpid(), signal.SIGINT))


def test_the_status_says_whether_a_run_can_go_on(make: MakeRecipe, killed: Path) -> None:
    files = RunFiles(0)
    files.show(RunOpened(killed))
    files.end(code=143, reason="terminated")
    assert json.loads((killed / "status.json").read_text())["resumable"] is True
    shutil.rmtree(killed / "checkpoints")
    files.end(code=5, reason="nan")
    assert json.loads((killed / "status.json").read_text())["resumable"] is False
