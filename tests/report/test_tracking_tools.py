"""Each tool that run.trackers names, with its real package and no network: what it holds of a run that failed, was
resumed two steps earlier, and came to its end."""

import importlib.util
import math
import os
import time

import pytest

from launcher.errors import NonFiniteError
from launcher.records.run import EvalRecord, EvalSamples, RunOpened, Sample
from launcher.report import trackers as report_trackers
from launcher.report.tracking_tools import TOOLS, flat_scalars
from tests.support.records import rank_record, run_record, step_record
from tests.support.tracker_readers import READERS, Seen

SECRET = "hf_" + "a1B2" * 9
CONFIG = {
    "recipe": "tiny",
    "train": {"lr": 0.001, "steps": 5, "warmup": None},
    "lora": {"r": 8, "targets": ["q_proj", "v_proj"]},
    "model": {"name": f"https://me:{SECRET}@host/model"},
}
FIGURES = {"loss", "lr", "grad_norm", "tokens_per_s", "step_s", "vram_mib", "eval_loss"}


def installed(name: str) -> pytest.param:
    there = importlib.util.find_spec(name) is not None
    return pytest.param(name, marks=pytest.mark.skipif(not there, reason=f"{name} is not installed"))


@pytest.fixture(scope="module", params=[installed(name) for name in TOOLS])
def seen(request, tmp_path_factory) -> Seen:
    """What the tool holds after the two parts of the run."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(report_trackers, "CLOSE_S", 120.0)  # a first import may take long
        trackers = report_trackers.make_trackers([request.param], CONFIG)
        with pytest.raises(NonFiniteError):
            _train(trackers, folder, first=1, fails=True)
        time.sleep(1.1)  # files are told apart, and read in the order of, whole seconds in their names
        longer = {**CONFIG, "train": {**CONFIG["train"], "steps": 6}}
        _train(report_trackers.make_trackers([request.param], longer), folder, first=4)
        assert "MLFLOW_TRACKING_URI" not in os.environ, "the next run of the process has a store of its own"
        return READERS[request.param](folder)


def _train(trackers, folder, *, first, fails=False):
    """Steps 1 to 5, or 4 to 6 again with other figures."""
    try:
        trackers.show(RunOpened(folder, step=first - 1))
        if first == 1:
            trackers.show(EvalRecord(0, 3.0))
        for step in range(first, first + (5 if fails else 3)):
            trackers.show(step_record(step, loss=float(step if fails else 10 * step)))
        trackers.show(EvalRecord(step, float(step)))
        trackers.show(EvalSamples(step, (Sample("why?\n|", "so", f"answer {step}"),)))
        if fails:
            raise NonFiniteError("loss must be finite; step 6 has nan", step=6)
        sample = Sample("define", "a list", f"a book {SECRET}")
        ranks = rank_record(0, recompiles=0), rank_record(1, recompiles=3)
        trackers.show(run_record(*ranks, steps=6, sample=sample))
    finally:
        assert trackers.close() == ()


def test_the_hyperparameters_are_flat_and_hold_no_credential(seen):
    assert (seen.config["recipe"], float(seen.config["train.lr"]), int(seen.config["lora.r"])) == ("tiny", 0.001, 8)
    assert (seen.config["lora.targets"], seen.config["train.warmup"]) == ('["q_proj", "v_proj"]', "null")
    assert SECRET not in str(seen) and "***" in seen.config["model.name"]


def test_a_value_that_a_resume_changed_is_told(seen):
    assert 6 in (seen.config["train.steps"], int(seen.summary.get("resumed.train.steps", 0)))


def test_both_parts_of_a_run_are_one_run_whose_steps_stand_once(seen):
    assert seen.runs == 1
    assert [step for step, _ in seen.losses] == [1, 2, 3, 4, 5, 6]
    assert seen.losses[5] == (6, 60.0) and seen.losses[3][1] in (4.0, 40.0)
    assert seen.evals in ([(0, 3.0), (5, 5.0), (6, 6.0)], [(0, 3.0), (6, 6.0)])  # TensorBoard forgets what came after
    assert seen.figures >= FIGURES


def test_the_end_has_compile_and_memory_figures_of_each_rank_and_the_verdicts(seen):
    assert float(seen.summary["ranks.1.compile.recompiles"]) == 3 and "ranks.0.compile.graph_hash" in seen.summary
    assert float(seen.summary["ranks.0.vram.peak_mib"]) == pytest.approx(7_491.2)
    assert math.isclose(float(seen.summary["verdicts.held"]), 1) and "no graph break" in seen.tables["verdicts"]


def test_the_samples_of_evaluations_and_of_the_end_are_readable(seen):
    assert "answer 6" in seen.tables["eval_samples"] and "a book ***" in seen.tables["sample"]


def test_the_last_status_is_the_runs(seen):
    assert seen.statuses[-1].startswith("finished")
    if len(seen.statuses) > 1:
        assert seen.statuses[0].startswith("failed: NonFiniteError: loss must be finite")


def test_scalars_are_flat_and_lists_are_left_out():
    nested = {"a": {"b": [1, "x"], "c": None, "d": True}, "e": 0.5}
    assert dict(flat_scalars(nested)) == {"a.c": "null", "a.d": True, "e": 0.5}
