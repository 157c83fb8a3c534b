"""Two gloo processes on this machine against one: same global batch, same gradients, two rows in the report."""

import json
import sys

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from launcher.recipe.load import resolve
from tests.conftest import ROOT
from tests.support.arguments import replaced
from tests.support.launches import LAUNCH, MAIN, finished, succeeded
from tests.support.workers import built

pytestmark = pytest.mark.slow
WORKERS = ROOT / "tests" / "train"


@pytest.fixture
def arguments(small_arguments, tmp_path):
    return [*small_arguments, f"run.output_dir={tmp_path / 'run'}"]


def test_every_layout_of_a_global_batch_of_eight_makes_the_same_gradients(arguments, tmp_path):
    results = {}
    for launcher, layouts in (([sys.executable], "1x8,8x1"), (LAUNCH, "1x4,4x1,2x2")):
        file = tmp_path / "gradients.pt"
        tokens = "lora.trainable_tokens=<|end|>,<|system|>"  # the second is in no rank's batch
        worker = [WORKERS / "gradients_worker.py", file, layouts, *replaced(arguments, "compile.mode=off"), tokens]
        succeeded(*launcher, *worker, "model.dtype=float32", cwd=tmp_path)
        results |= torch.load(file, weights_only=True)
    assert len(results) == 5
    reference = results.pop("1 ranks x 1x8")
    size = reference["gradients"].norm()
    assert size > 1e-3
    differences = {name: float((r["gradients"] - reference["gradients"]).norm() / size) for name, r in results.items()}
    print(differences)
    assert max(differences.values()) < 1e-6
    for result in results.values():
        torch.testing.assert_close(result["loss"], reference["loss"], rtol=1e-6, atol=0)


def test_two_ranks_go_on_bit_equal_with_every_batching_and_each_with_its_own_random_numbers(arguments, tmp_path):
    recipe = replaced(arguments, "compile.mode=off", "train.steps=6", "train.micro_batch=1", "lora.dropout=0.2")
    out = succeeded(*LAUNCH, WORKERS / "resume_worker.py", *recipe, cwd=tmp_path)
    assert out.count(" goes on") == 2 * 4


def test_a_run_on_two_ranks_reports_both_with_equal_graph_hashes_and_writes_its_files_once(arguments, tmp_path):
    shape = ["train.micro_batch=2", "run.trackers=[tensorboard]"]
    out = succeeded(*LAUNCH, MAIN, *replaced(arguments, *shape), cwd=tmp_path)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    hashes = {rank["compile"]["graph_hash"] for rank in report["ranks"]}
    assert len(hashes) == 1 and "-" not in hashes
    assert all(verdict["holds"] for verdict in report["verdicts"])
    assert "every rank compiled the same graphs" in out
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4  # two steps, two evaluations
    assert len(list((tmp_path / "run" / "trackers" / "tensorboard").glob("events*"))) == 2  # scalars, hyperparameters
    assert json.loads((tmp_path / "run" / "status.json").read_text())["code"] == 0


@pytest.mark.parametrize(
    ("fault", "code", "says", "step", "steps"),
    [
        ("shape", 9, "no recompile", 1, [1]),
        ("adapter", 9, "every rank must start from the same adapter; they differ:", 0, []),
    ],
)
def test_a_fault_on_one_rank_ends_both_and_status_json_names_the_cause(
    arguments, tmp_path, fault, code, says, step, steps
):
    shape = ["train.steps=6", "train.micro_batch=1", "train.accumulation=2"]
    worker = [WORKERS / "failing_worker.py", fault, *replaced(arguments, *shape)]
    done = finished(*LAUNCH, *worker, cwd=tmp_path)
    assert done.returncode != 0
    assert says in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["code"], status["step"], says in status["reason"]) == (code, step, True), status
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == steps
    assert not (tmp_path / "run" / "adapter").exists()


def test_ranks_that_decompose_the_base_otherwise_take_the_start_of_rank_0(arguments, tmp_path):
    """With the fault that ends a run whose adapters begin at zero."""
    recipe = [*replaced(arguments, "compile.mode=off"), "lora.init=pissa"]
    succeeded(*LAUNCH, WORKERS / "failing_worker.py", "adapter", *recipe, cwd=tmp_path)
    assert (tmp_path / "run" / "adapter").exists()


def test_both_ranks_begin_with_the_start_that_rank_0_computes_as_one_process_does(arguments, tmp_path):
    recipe = replaced(arguments, "compile.mode=off", "lora.init=eva", "train.steps=1", "model.dtype=float32")
    succeeded(*LAUNCH, WORKERS / "failing_worker.py", "eva", *recipe, cwd=tmp_path)  # where rank 1's is another
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    alone = get_peft_model_state_dict(built(resolve(recipe).recipe).built.peft)
    starts = [name for name in saved if "lora_A" in name]  # B is zero in the first step: no gradient reaches A
    assert len(starts) == 14
    for name in starts:
        torch.testing.assert_close(saved[name], alone[name], rtol=0, atol=1e-4)


def test_a_fault_in_the_data_ends_both_ranks_and_is_printed_once(arguments, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a river"}\n{"text": \n')
    done = finished(*LAUNCH, MAIN, *replaced(arguments, f"data.sources=[{{path: {broken}}}]"), cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count(f"{broken}:2: every line is one JSON object.") == 1
    assert "exit code 3" in done.stderr
    assert not (tmp_path / "run").exists()
    assert "LostRank" not in done.stderr and "another rank" not in done.stderr


def test_a_process_ends_though_its_last_collective_is_still_being_freed(tmp_path):
    """Without ranks.hold_process_group this hangs within a few dozen of these lives."""
    done = finished(sys.executable, WORKERS / "group_worker.py", "300", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
