"""Signals to a run that trains, alone and as two ranks: what is saved, how soon all is gone, what status.json says."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.bundle import bundles_of, step_of
from launcher.checkpoint.run_files import RunFiles
from launcher.runtime.signals import HungUp, Preempted, Terminated, listening
from launcher.train import evaluation, loop
from tests.conftest import ROOT
from tests.support.arguments import replaced
from tests.support.launches import (
    ALONE,
    LAUNCH,
    LAUNCH_ONE,
    MAIN,
    family_of_process,
    finished,
    seconds_until_gone,
    started,
    wait_until,
)
from tests.support.runs import lines, trained

MakeRecipe = Callable[..., Any]

SAVED_S = 25.0


@pytest.fixture
def not_ignored() -> Iterator[None]:
    """SIGHUP is ignored where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


ARGUMENTS = [
    "recipe=tiny", "compile.mode=off", "train.steps=2000", "train.micro_batch=1", "data.max_length=128",
    "run.sample_tokens=0", "train.save_every=1h", "run.output_dir=run",
]  # fmt: skip


@pytest.fixture
def make(make_recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """Recipes of eight steps that evaluate every fourth and save only at a signal, in `run` or another folder."""

    def recipe(folder: str = "run", **train: Any) -> Any:
        train = {"steps": 8, "save_every": "1h", "eval_every": 4, **train}
        return make_recipe(compile={"mode": "off"}, train=train, run={"output_dir": str(tmp_path / folder)})

    return recipe


def send(*signums: int) -> Callable[[], None]:
    return lambda: [os.kill(os.getpid(), signum) for signum in signums][0]


def saved_steps(folder: Path) -> list[int]:
    return [step_of(path) for path in bundles_of(folder / "checkpoints")]


@pytest.mark.parametrize(
    ("signum", "kind"),
    [
        (signal.SIGTERM, Terminated),
        (signal.SIGINT, KeyboardInterrupt),
        (signal.SIGHUP, HungUp),
        (signal.SIGUSR1, Preempted),
    ],
)
def test_fault_25_a_signal_saves_at_the_next_step_and_the_run_goes_on_from_there(
    make: MakeRecipe, tmp_path: Path, not_ignored: None, signum: int, kind: type[BaseException]
) -> None:
    trained(make("whole"))
    with listening(), pytest.raises(kind, match=r"step 6 is saved; .* run.output_dir="):
        trained(make(), until=5, act=send(signum))
    assert saved_steps(tmp_path / "run") == [6]
    trained(make())
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_fault_25_a_run_without_checkpoints_says_that_nothing_is_saved(make: MakeRecipe, not_ignored: None) -> None:
    with listening(), pytest.raises(Terminated, match="no checkpoint was saved: train.save_every is off"):
        trained(make(save_every=0), until=3, act=send(signal.SIGTERM))


def test_fault_25_a_signal_after_the_last_step_is_not_lost(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.Checkpoints.save

    def save(self: Any, *arguments: Any) -> None:
        if self._worker.state.step == 8:
            send(signal.SIGTERM)()
        original(self, *arguments)

    monkeypatch.setattr(loop.Checkpoints, "save", save)
    with listening(), pytest.raises(Terminated, match="step 8 is saved"):
        trained(make(save_every=5))


def test_fault_26_accelerates_sigterm_after_an_interrupt_does_not_hinder_the_save(make: MakeRecipe) -> None:
    with listening(), pytest.raises(KeyboardInterrupt, match="step 4 is saved"):
        trained(make(), until=3, act=send(signal.SIGINT, signal.SIGTERM))


def test_fault_26_a_second_interrupt_ends_a_notebooks_run_at_once(make: MakeRecipe, tmp_path: Path) -> None:
    with listening(), pytest.raises(KeyboardInterrupt):
        trained(make(save_every=2), until=5, act=send(signal.SIGINT, signal.SIGINT))
    assert 2 in saved_steps(tmp_path / "run")
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5]


def test_fault_27_a_signal_cuts_an_evaluation_short_and_the_run_that_goes_on_makes_it(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation may take longer than the launcher waits before it kills."""
    trained(make("whole"))
    original, batches = evaluation.stop_vote, []

    def stop_vote() -> float:
        batches.append(1)
        if len(batches) == 1:  # before the first batch of step 4's evaluation: that of step 0 is not in the loop
            send(signal.SIGTERM)()
        return original()

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "stop_vote", stop_vote)
        with listening(), pytest.raises(Terminated, match="step 4 is saved"):
            trained(make())
    assert [line["step"] for line in lines(tmp_path / "run") if "eval_loss" in line] == [0]
    trained(make())
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


@pytest.mark.parametrize("phase", ["loading model", "compiling", "saving adapter"])
def test_fault_27_a_signal_between_the_steps_ends_at_once_and_leaves_no_half_folder(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    show = RunFiles.show

    def signalled(self: RunFiles, event: Any) -> None:
        show(self, event)
        if getattr(event, "name", event) == phase:
            send(signal.SIGTERM)()

    monkeypatch.setattr(RunFiles, "show", signalled)
    with listening(), pytest.raises(Terminated):
        trained(make())
    assert not list((tmp_path / "run").rglob("*.part")) and not (tmp_path / "run" / "adapter").exists()
    assert saved_steps(tmp_path / "run") == ([8] if phase == "saving adapter" else [])


def stopped(launch: list[str], folder: Path, *signums: int, **variables: str) -> tuple[dict[str, Any], str]:
    """Start a run and send it signals once it has trained three steps: status.json and stderr. All must be gone soon,
    and where a step was saved it is the one that status.json names."""
    process = started(*launch, MAIN, *ARGUMENTS, cwd=folder, **variables)
    metrics = folder / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 3, process=process)
    everyone = family_of_process(process)
    for signum in signums:
        process.send_signal(signum)
    _, err = process.communicate(timeout=SAVED_S)
    seconds_until_gone(everyone, timeout_s=SAVED_S)
    return json.loads((folder / "run" / "status.json").read_text()), err


def is_saved(status: dict[str, Any], folder: Path, *, code: int) -> bool:
    told = f"step {status['step']} is saved" in status["reason"]
    return told and status["code"] == code and saved_steps(folder / "run") == [status["step"]]


@pytest.mark.faults
@pytest.mark.parametrize("launch", [LAUNCH_ONE, LAUNCH], ids=["one rank", "two ranks"])
def test_fault_25_sigterm_to_the_launcher_saves_and_a_second_one_changes_nothing(
    tmp_path: Path, launch: list[str]
) -> None:
    status, err = stopped(launch, tmp_path, signal.SIGTERM, signal.SIGTERM)
    assert is_saved(status, tmp_path, code=143), status
    assert "(exit code 143)" in err


@pytest.mark.faults
@pytest.mark.parametrize("launch", [LAUNCH_ONE, LAUNCH], ids=["one rank", "two ranks"])
def test_fault_28_the_workers_of_a_killed_launcher_save_and_end(tmp_path: Path, launch: list[str]) -> None:
    status, _ = stopped(launch, tmp_path, signal.SIGKILL)
    assert is_saved(status, tmp_path, code=143), status


@pytest.mark.faults
def test_fault_44_a_closed_terminal_saves_on_all_ranks(tmp_path: Path) -> None:
    status, _ = stopped(LAUNCH, tmp_path, signal.SIGHUP)
    assert is_saved(status, tmp_path, code=129), status


@pytest.mark.faults
def test_fault_26_a_second_interrupt_ends_at_once_with_one_line(tmp_path: Path) -> None:
    status, err = stopped(ALONE, tmp_path, signal.SIGINT, signal.SIGINT)
    assert status["code"] == 130 and status["reason"].startswith("interrupted; ")
    assert len(err.splitlines()) == 1 and err.endswith("(exit code 130)\n"), err


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && echo localhost || echo "$@" >> "$REQUEUED"
"""


@pytest.mark.faults
def test_a_slurm_job_that_runs_out_of_time_saves_is_requeued_and_goes_on(tmp_path: Path) -> None:
    """The script of accelerate_configs with stand-ins for SLURM's commands; the second start comes to its end."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "REQUEUED": str(tmp_path / "requeued"),
        "QLORA_CONFIG": "accelerate_configs/single.yaml", "QLORA_OUTPUT": str(tmp_path / "run"),
        "SLURM_JOB_ID": "123456", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "1",
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    job = ["bash", ROOT / "accelerate_configs" / "slurm.sbatch", *replaced(ARGUMENTS[:-1], "train.steps=40")]
    process, metrics = started(*job, cwd=ROOT, **variables), tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and '"loss"' in metrics.read_text(), process=process)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=SAVED_S)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert is_saved(status, tmp_path, code=138) and status["step"] < 40, status
    assert process.returncode != 0 and (tmp_path / "requeued").read_text() == "requeue 123456\n"
    again = finished(*job, cwd=ROOT, **variables)
    assert again.returncode == 0, again.stderr[-3000:]
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == list(range(1, 41))
    assert (tmp_path / "requeued").read_text() == "requeue 123456\n"
