"""Early stop, the best checkpoint, and samples at evaluations."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.bundle import bundles_of, read_bundle, step_of
from launcher.errors import CheckpointError, RecipeError
from launcher.records.run import EvalRecord, RunRecord
from launcher.train import evaluation, finish
from tests.conftest import ROOT
from tests.support.arguments import replaced
from tests.support.launches import LAUNCH, succeeded
from tests.support.planted import plant
from tests.support.runs import adapter, lines, trained

pytestmark = pytest.mark.usefixtures("clean_dynamo")

MakeRecipe = Callable[..., Any]
EVAL_LOSSES = (3.0, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75)  # by step
EVERY_STEP = {"eval_every": 1, "save_every": "1h"}
KEEP_BEST = {**EVERY_STEP, "lr": 1e-2, "schedule": "constant", "warmup": 0, "keep_best": True, "keep": 1}


@pytest.fixture
def worse_from_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """From step 4 on training goes up the gradient."""
    plant(monkeypatch, dict.fromkeys(range(4, 100), -1.0))


@pytest.fixture
def worse_from_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluations give EVAL_LOSSES."""
    monkeypatch.setattr(evaluation, "eval_loss_and_votes", lambda worker: (EVAL_LOSSES[worker.state.step], 0.0))


def record_of(events: list[Any]) -> RunRecord:
    assert isinstance(events[-1], RunRecord)
    return events[-1]


def verdict_of(record: RunRecord, claim: str) -> Any:
    [verdict] = [verdict for verdict in record.verdicts if verdict.claim == claim]
    return verdict


def test_training_ends_early_and_a_resume_keeps_to_it(make: MakeRecipe, tmp_path: Path, worse_from_2: None) -> None:
    record = record_of(trained(make(train={**EVERY_STEP, "patience": 3})))
    assert record.stopped.startswith("early, after step 4 of 8: 3 evaluations in a row without a lower eval loss")
    assert record.stopped.endswith("than 2.0000 after step 1")
    assert [step_of(bundle) for bundle in bundles_of(tmp_path / "run" / "checkpoints")] == [4]
    with pytest.raises(CheckpointError, match=r"has ended early.*\nRaise train.patience"):
        trained(make(train={**EVERY_STEP, "patience": 3}))
    assert record_of(trained(make(train={**EVERY_STEP, "patience": 5}))).stopped.startswith("early, after step 6 of 8")
    assert record_of(trained(make(train=EVERY_STEP))).stopped == ""
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == list(range(1, 9))


def test_a_run_that_is_killed_once_it_had_no_patience_left_takes_no_further_step(
    make: MakeRecipe, tmp_path: Path, worse_from_2: None
) -> None:
    section = {**EVERY_STEP, "save_every": 1}
    trained(make(train=section), until=6)
    assert [step_of(bundle) for bundle in bundles_of(tmp_path / "run" / "checkpoints")][0] >= 4
    record = record_of(trained(make(train={**section, "patience": 3})))
    assert record.stopped and record.parts[-1].first_step > record.parts[-1].last_step


def test_the_best_checkpoint_is_kept_and_its_adapter_given_back(
    make: MakeRecipe, tmp_path: Path, worse_from_4: None
) -> None:
    events = trained(make(train=KEEP_BEST))
    record, losses = record_of(events), {e.step: e.eval_loss for e in events if isinstance(e, EvalRecord) and e.step}
    best = min(losses, key=lambda step: losses[step])
    assert best == 3, losses
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [step_of(bundle) for bundle in bundles_of(checkpoints)] == [8, best]
    kept = checkpoints / f"step-{best}" / "adapter" / "adapter_model.safetensors"
    assert adapter(tmp_path / "run") == kept.read_bytes()
    verdict = verdict_of(record, "the adapter is the best checkpoint's")
    figure = f"eval loss {losses[best]:.6f} after step {best} of 8, {losses[best]:.6f} given back"
    assert (verdict.holds, verdict.evidence) == (True, figure)
    trained(make(train={**KEEP_BEST, "steps": 9}))  # goes on from the last, not from the best
    assert lines(tmp_path / "run")[-2]["step"] == 9
    assert [step_of(bundle) for bundle in bundles_of(checkpoints)] == [9, best]


@pytest.mark.slow
def test_both_ranks_get_the_best_checkpoints_adapter_back(small_arguments: tuple[str, ...], tmp_path: Path) -> None:
    """The eval loss that is measured again is the sum of both ranks' shares."""
    options = ("compile.mode=off", "train.steps=6", "run.sample_tokens=0", f"run.output_dir={tmp_path / 'run'}")
    best = (f"train.{key}={str(value).lower()}" for key, value in KEEP_BEST.items())
    argv = replaced(small_arguments, *options, *best)
    planted = ROOT / "tests" / "faults" / "planted.py"
    succeeded(*LAUNCH, planted, "worse", "none", "none", *argv, cwd=tmp_path)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    [verdict] = [each for each in report["verdicts"] if each["claim"] == "the adapter is the best checkpoint's"]
    assert len(report["ranks"]) == 2 and verdict["holds"] and "after step 3 of 6" in verdict["evidence"]
    kept = tmp_path / "run" / "checkpoints" / "step-3" / "adapter" / "adapter_model.safetensors"
    assert adapter(tmp_path / "run") == kept.read_bytes()


@pytest.mark.parametrize("fault", ["other weights", "damaged"])
def test_an_adapter_that_is_not_the_best_ones_fails_its_verdict(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worse_from_4: None, fault: str
) -> None:
    def read(bundle: Path) -> Any:
        if fault == "damaged":
            (bundle / "state.json").write_text("{}")
        state = read_bundle(bundle)
        for tensor in state["state"]["training"]["adapters"].values():
            tensor.mul_(1.1)
        return state

    monkeypatch.setattr(finish, "read_bundle", read)
    record = record_of(trained(make(train=KEEP_BEST)))
    verdict = verdict_of(record, "the adapter is the best checkpoint's")
    assert not verdict.holds
    assert ("given back" if fault == "other weights" else "state.json was changed") in verdict.evidence
    assert (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("key", ["patience", "keep_best"])
def test_without_validation_rows_they_are_refused(make: MakeRecipe, tmp_path: Path, key: str) -> None:
    with pytest.raises(RecipeError, match=rf"train.{key} compares eval losses; no row validates"):
        trained(make(data={"sources": [{"path": str(one_row(tmp_path))}]}, train={**EVERY_STEP, key: 1}))
    assert not (tmp_path / "run").exists()


def one_row(folder: Path) -> Path:
    """A file of which no row can be held out."""
    file = folder / "one.jsonl"
    file.write_text(json.dumps({"text": "one row"}))
    return file


def test_the_same_prompts_are_answered_at_every_evaluation_and_once_after_a_resume(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {
        "run": {"eval_samples": 2, "sample_tokens": 3}, "train": {"eval_every": 3}, "lora": {"dropout": 0.1},
    }  # fmt: skip

    def answers(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]

    def recipe(name: str, **changes: Any) -> Any:
        run = {**sections["run"], "output_dir": str(tmp_path / name), **changes}
        return make(name, **{**sections, "run": run})

    trained(recipe("whole"))
    whole = answers("whole")
    assert [line["step"] for line in whole] == [0, 0, 3, 3, 6, 6, 8, 8]
    assert len({line["prompt"] for line in whole}) == 2 and whole[0]["prompt"] == whole[-2]["prompt"]
    assert all(line["expected"] for line in whole)
    trained(recipe("run"), until=7)
    trained(recipe("run"))
    assert answers("run") == whole
    trained(recipe("none", eval_samples=0))
    assert lines(tmp_path / "none") == lines(tmp_path / "whole")  # a sample draws no random number
    assert not (tmp_path / "none" / "samples.jsonl").exists()
