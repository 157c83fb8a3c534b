"""Runs whose figures go wrong: spikes, batches that do harm, training that teaches nothing."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ContractError, DivergedError, NonFiniteError
from launcher.model.packed import PackedCausalLM
from launcher.records.run import RunRecord, StepRecord
from launcher.train.history import RunHistory
from tests.support.planted import plant
from tests.support.runs import trained

pytestmark = pytest.mark.usefixtures("clean_dynamo")

MakeRecipe = Callable[..., Any]
UNCOMPILED = {"mode": "off"}


def bad_batches(folder: Path) -> dict[str, list[dict[str, Any]]]:
    files = sorted((folder / "bad_batches").glob("*.jsonl"))
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def test_fault_21_a_spike_is_clipped_noted_and_its_batch_kept(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant(monkeypatch, {12: 1000.0})
    events = trained(make_recipe(compile=UNCOMPILED, train={"steps": 14, "save_every": 0}))
    steps = [event for event in events if isinstance(event, StepRecord)]
    assert [step.step for step in steps if step.spike] == [12]
    assert steps[11].grad_norm > 100 * steps[10].grad_norm and steps[13].loss < 2 * steps[0].loss
    [(name, documents)] = bad_batches(tmp_path / "run").items()
    assert name == "step-12-rank-0" and len(documents) >= 2
    for document in documents:
        assert len(document["ids"]) == len(document["labels"]) and document["text"].strip()
        targets = {n: label for n, label in enumerate(document["labels"]) if label != -100}
        assert targets and all(document["ids"][n + 1] == label for n, label in targets.items())


@pytest.mark.parametrize("factors", [{12: 1000.0, 13: 1000.0}, {12: 5.0, 13: 5.0}], ids=["norm", "loss"])
def test_fault_21_spikes_in_a_row_end_the_run_once_patience_is_over(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, factors: dict[int, float]
) -> None:
    plant(monkeypatch, factors)
    section = {"steps": 16, "save_every": 5, "spike_patience": 2}
    with pytest.raises(DivergedError, match="step 13 is number 2") as caught:
        trained(make_recipe(compile=UNCOMPILED, train=section))
    assert (caught.value.code, caught.value.step) == (5, 13)
    assert [*bad_batches(tmp_path / "run")] == ["step-12-rank-0", "step-13-rank-0"]
    assert (tmp_path / "run" / "checkpoints" / "step-10").exists()


def test_fault_21_spikes_that_pass_do_not_use_patience_up_and_the_first_steps_are_none(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, {3: 1000.0, 12: 1000.0, 14: 1000.0})
    events = trained(make_recipe(compile=UNCOMPILED, train={"steps": 16, "spike_patience": 2, "save_every": 0}))
    assert [event.step for event in events if isinstance(event, StepRecord) and event.spike] == [12, 14]


def test_fault_19_the_batch_of_a_step_that_is_not_finite_is_kept(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant(monkeypatch, {3: math.nan})
    train = {"steps": 6, "log_every": 3, "micro_batch": 1, "accumulation": 2, "save_every": 0}
    history = RunHistory()
    with pytest.raises(NonFiniteError, match=r"step 2 has loss nan[^\n]*\n[^\n]*bad_batches/step-2-rank-"):
        trained(make_recipe(compile=UNCOMPILED, train=train), history=history)
    assert history.worker and history.worker.state.step == 3, "the steps after it were made before it was read"
    assert all(parameter.isfinite().all() for parameter in history.worker.step.parameters)
    [(name, documents)] = bad_batches(tmp_path / "run").items()
    assert name == "step-2-rank-0" and {document["micro_batch"] for document in documents} == {0, 1}


def test_fault_19_the_batch_of_an_evaluation_that_is_not_finite_is_kept(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant(monkeypatch, {}, evaluations=math.nan)
    with pytest.raises(NonFiniteError, match="eval loss must be finite; after step 0"):
        trained(make_recipe(compile=UNCOMPILED))
    assert [*bad_batches(tmp_path / "run")] == ["step-0-rank-0"]


def test_fault_49_a_run_that_learns_nothing_fails_its_verdict(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PackedCausalLM.forward
    monkeypatch.setattr(PackedCausalLM, "forward", lambda self, *inputs: original(self, *inputs) * 0 + math.log(8192))
    sections = {"compile": UNCOMPILED, "train": {"steps": 20, "save_every": 0}}
    record = trained(make_recipe(**sections))[-1]
    assert isinstance(record, RunRecord)
    [verdict] = [verdict for verdict in record.verdicts if not verdict.holds]
    assert verdict.claim == "training lowered the loss"
    assert verdict.evidence.endswith("gradient norm 0 in the last 5 steps")
    monkeypatch.undo()
    record = trained(make_recipe(**sections, run={"output_dir": None, "sample_tokens": 0}))[-1]
    assert isinstance(record, RunRecord) and all(verdict.holds for verdict in record.verdicts)
    assert "training lowered the loss" in [verdict.claim for verdict in record.verdicts]


def test_fault_49_a_strict_run_that_learns_nothing_ends_with_code_9_after_its_adapter_is_saved(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    train = {"steps": 20, "save_every": 0, "lr": 1e-30}
    with pytest.raises(ContractError, match="training lowered the loss: eval loss .* before") as caught:
        trained(make_recipe(train=train))
    assert caught.value.code == 9 and (tmp_path / "run" / "adapter").exists()
