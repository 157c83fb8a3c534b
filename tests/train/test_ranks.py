"""Two gloo processes on this machine against one: same global batch, same gradients, two rows in the report."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT

LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    str(ROOT / "accelerate_configs" / "cpu2.yaml"),
]


def finished(command, tmp_path):
    """Run to its end. `--main_process_port 0` takes a free port, so that two suites on one machine do not meet."""
    environment = {**os.environ, "ACCELERATE_DISABLE_RICH": "1", "HF_HOME": str(tmp_path / "hf")}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, cwd=tmp_path)


def launched(command, tmp_path):
    """Run to its good end; its stdout."""
    done = finished(command, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def arguments(small_model, rows_file):
    return [
        "recipe=tiny", f"model.name={small_model}", f"data.sources=[{{path: {rows_file}}}]", "data.max_length=64",
        "data.validation=0.1", "compile.backend=aot_eager", "train.lr=1e-3", "lora.r=4", "run.sample_tokens=0",
    ]  # fmt: skip


def test_two_ranks_make_the_gradients_of_one_process_on_the_same_global_batch(arguments, tmp_path):
    worker = str(ROOT / "tests" / "train" / "gradients_worker.py")
    layouts = {
        "alone": ([sys.executable], ["train.micro_batch=8"]),
        "accumulated": ([sys.executable], ["train.micro_batch=1", "train.accumulation=8"]),
        "ranks": ([*LAUNCH, "--main_process_port", "0"], ["train.micro_batch=2", "train.accumulation=2"]),
    }
    results = {}
    for name, (launcher, shape) in layouts.items():
        launched([*launcher, worker, str(tmp_path / f"{name}.pt"), *arguments, *shape], tmp_path)
        results[name] = torch.load(tmp_path / f"{name}.pt", weights_only=True)
    alone = torch.cat([g.flatten() for g in results["alone"]["gradients"]])
    assert alone.norm() > 1e-3
    for name in ("accumulated", "ranks"):
        other = torch.cat([g.flatten() for g in results[name]["gradients"]])
        assert (other - alone).norm() / alone.norm() < 1e-6
        torch.testing.assert_close(results[name]["loss"], results["alone"]["loss"], rtol=1e-6, atol=0)


def test_a_run_on_two_ranks_reports_both_with_equal_graph_hashes(arguments, tmp_path):
    main = str(ROOT / "launcher" / "main.py")
    shape = ["train.steps=2", "train.micro_batch=2", f"run.output_dir={tmp_path / 'run'}", "run.trackers=[tensorboard]"]
    out = launched([*LAUNCH, "--main_process_port", "0", main, *arguments, *shape], tmp_path)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    hashes = {rank["compile"]["graph_hash"] for rank in report["ranks"]}
    assert len(hashes) == 1
    assert "-" not in hashes
    assert all(verdict["holds"] for verdict in report["verdicts"])
    assert "every rank compiled the same graphs" in out
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4  # two steps, two evaluations, once
    assert json.loads((tmp_path / "run" / "status.json").read_text())["code"] == 0


@pytest.mark.parametrize(("fault", "code", "says"), [("nan", 5, "step 2 has loss nan"), ("shape", 9, "no recompile")])
def test_a_fault_on_one_rank_ends_both_and_status_json_names_the_cause(arguments, tmp_path, fault, code, says):
    worker = str(ROOT / "tests" / "train" / "failing_worker.py")
    shape = ["train.steps=6", "train.micro_batch=1", "train.accumulation=2", f"run.output_dir={tmp_path / 'run'}"]
    done = finished([*LAUNCH, "--main_process_port", "0", worker, fault, *arguments, *shape], tmp_path)
    assert done.returncode != 0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["code"], says in status["reason"]) == (code, True), status
    assert status["step"] == (2 if fault == "nan" else 1)
    assert says in done.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1]
    assert not (tmp_path / "run" / "adapter").exists()
