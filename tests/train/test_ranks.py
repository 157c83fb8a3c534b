"""Two gloo processes on this machine against one: same global batch, same gradients, two rows in the report."""

import json
import os
import signal
import subprocess
import sys

import psutil
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


def finished(command, tmp_path, *, timeout_s=180):
    """Run to its end. `--main_process_port 0` takes a free port, so that two suites on one machine do not meet.
    What hangs is ended with all its processes, and the assertion shows where each of them stood."""
    environment = {
        **os.environ,
        "ACCELERATE_DISABLE_RICH": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONFAULTHANDLER": "1",
    }
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        for pid in sorted(children(process.pid), reverse=True):
            os.kill(pid, signal.SIGABRT)
        out, err = process.communicate()
        raise AssertionError(f"not done after {timeout_s} s\n{out[-2000:]}{err[-8000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def children(pid):
    """A process and all that descend from it; torch's launcher puts each worker in a session of its own."""
    process = psutil.Process(pid)
    return [pid, *(child.pid for child in process.children(recursive=True))]


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
        "ranks": ([*LAUNCH, "--main_process_port", "0"], ["train.micro_batch=2", "train.accumulation=2"]),
    }
    results = {}
    for name, (launcher, shape) in layouts.items():
        argv = [str(tmp_path / f"{name}.pt"), *arguments, "compile.mode=off", *shape]
        launched([*launcher, worker, *argv], tmp_path)
        results[name] = torch.load(tmp_path / f"{name}.pt", weights_only=True)
    alone = torch.cat([g.flatten() for g in results["alone"]["gradients"]])
    assert alone.norm() > 1e-3
    other = torch.cat([g.flatten() for g in results["ranks"]["gradients"]])
    assert (other - alone).norm() / alone.norm() < 1e-6
    torch.testing.assert_close(results["ranks"]["loss"], results["alone"]["loss"], rtol=1e-6, atol=0)


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


def test_a_rank_that_begins_with_another_adapter_ends_the_run_before_it_trains(arguments, tmp_path):
    worker = str(ROOT / "tests" / "train" / "failing_worker.py")
    shape = ["train.steps=1", "train.micro_batch=1", f"run.output_dir={tmp_path / 'run'}"]
    done = finished([*LAUNCH, "--main_process_port", "0", worker, "adapter", *arguments, *shape], tmp_path)
    assert done.returncode != 0
    assert "every rank must start from the same adapter; they differ:" in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["code"], status["step"]) == (9, 0)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_a_fault_in_the_data_is_met_by_both_ranks_and_said_once(arguments, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a river"}\n{"text": \n')
    main = str(ROOT / "launcher" / "main.py")
    others = [argument for argument in arguments if not argument.startswith("data.sources")]
    more = [f"data.sources=[{{path: {broken}}}]", f"run.output_dir={tmp_path / 'run'}"]
    done = finished([*LAUNCH, "--main_process_port", "0", main, *others, *more], tmp_path)
    assert done.returncode != 0
    assert done.stderr.count(f"{broken}:2: every line is one JSON object.") == 1
    assert "exit code 3" in done.stderr
    assert not (tmp_path / "run").exists()
    assert "LostRank" not in done.stderr and "another rank" not in done.stderr


def test_a_process_ends_though_its_last_collective_is_still_being_put_away(tmp_path):
    """Without ranks.hold_process_group this hangs within a few dozen of these lives."""
    worker = str(ROOT / "tests" / "train" / "group_worker.py")
    done = finished([sys.executable, worker, "300"], tmp_path, timeout_s=90)
    assert done.returncode == 0, done.stderr[-3000:]
