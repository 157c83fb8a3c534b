"""What ends one rank ends all with the same code, and status.json keeps the first cause."""

import errno
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint import run_files
from launcher.checkpoint.bundle import bundles_of, faults_of, step_of
from launcher.checkpoint.folder import RunFolder
from launcher.checkpoint.run_files import RunFiles
from launcher.errors import MemoryExhausted, NonFiniteError
from launcher.records.run import RunOpened, StartRecord, StepRecord
from launcher.runtime.failures import classified
from launcher.runtime.ranks import RankInfo
from launcher.train.history import SKIPS_IN_A_ROW, RunHistory
from launcher.train.loop import training
from tests.conftest import request_for
from tests.support.arguments import replaced
from tests.support.launches import LAUNCH, finished

PLANTED = Path(__file__).with_name("planted.py")
OPTIONS = ("compile.mode=off", "train.steps=6", "train.micro_batch=1", "train.save_every=1", "run.sample_tokens=0")
PROMISED_S = 20

MakeRecipe = Callable[..., Any]


def ended_by(fault: str, rank: int, arguments: tuple[str, ...], folder: Path) -> tuple[dict[str, Any], str]:
    """status.json and the errors of a launch with a fault on one rank; seconds from the fault are checked."""
    run, moment = folder / "run", folder / "moment"
    argv = replaced(arguments, *OPTIONS, f"run.output_dir={run}")
    done = finished(*LAUNCH, PLANTED, fault, rank, moment, *argv, cwd=folder)
    assert time.monotonic() - float(moment.read_text()) < PROMISED_S
    assert "Traceback (most recent call last):\n  File" in done.stderr, "the process launcher's own"
    return json.loads((run / "status.json").read_text()), done.stderr


def kept_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints, all of which are whole."""
    bundles = list(bundles_of(folder / "run" / "checkpoints"))
    assert [fault for bundle in bundles for fault in faults_of(bundle)] == []
    return sorted(step_of(bundle) for bundle in bundles)


@pytest.mark.faults
def test_fault_19_a_nan_loss_on_one_rank_ends_both_with_code_5_before_the_update(
    small_arguments: tuple[str, ...], tmp_path: Path
) -> None:
    status, errors = ended_by("nan", 1, small_arguments, tmp_path)
    assert (status["code"], status["step"], status["resumable"]) == (5, 3, True)
    for rank in (0, 1):
        assert f"rank {rank}: loss and gradients must be finite; step 3 has loss nan" in errors
    assert kept_steps(tmp_path) == [1, 2]
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.faults
def test_fault_22_one_rank_out_of_memory_ends_both_with_code_6_and_the_ledger(
    small_arguments: tuple[str, ...], tmp_path: Path
) -> None:
    status, errors = ended_by("memory", 1, small_arguments, tmp_path)
    assert (status["code"], status["rank"], status["step"]) == (6, 1, 2)
    for words in (
        "the device ran out of memory on rank 1; held by phase: ",
        "after compile",
        "lower train.micro_batch",
    ):
        assert words in status["reason"]
    assert errors.count("the device ran out of memory on rank 1") == 1
    assert errors.count("exitcode  : 6 ") == 2
    assert 2 in kept_steps(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_fault_47_data_that_one_rank_alone_loses_is_told_once_whichever_rank_it_is(
    small_arguments: tuple[str, ...], tmp_path: Path, rank: int
) -> None:
    status, errors = ended_by("data", rank, small_arguments, tmp_path)
    assert (status["code"], status["rank"], status["step"]) == (3, rank, 2)
    assert errors.count("error: the data must stay; that of one rank is gone (exit code 3)") == 1
    assert errors.count("exitcode  : 3 ") == 2


@pytest.mark.faults
def test_fault_34_a_save_that_fails_on_rank_0_ends_both_with_code_7(
    small_arguments: tuple[str, ...], tmp_path: Path
) -> None:
    status, errors = ended_by("save", 0, small_arguments, tmp_path)
    assert (status["code"], status["rank"], status["resumable"]) == (7, 0, True)
    assert errors.count("A checkpoint needs more than") == 1
    assert errors.count("exitcode  : 7 ") == 2
    assert kept_steps(tmp_path) == [1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error: Cuda failure 2 'out of memory'"),
        MemoryError("Unable to allocate 64.0 GiB for an array"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_fault_22_every_form_of_out_of_memory_is_code_6_with_the_ledger(error: Exception) -> None:
    held = pytest.raises(MemoryExhausted, match="on rank 1; held by phase: after load 9 MiB")
    with held as caught, classified(RankInfo(1, 1, 2, 2), lambda: "after load 9 MiB"):
        raise error
    assert caught.value.code == 6


def test_fault_22_memory_that_the_cpu_lacks_is_code_6() -> None:
    with pytest.raises(MemoryExhausted), classified(RankInfo(0, 0, 1, 1)):
        torch.empty(2**50)


def with_scale(recipe: Any, scale: float) -> tuple[list[StepRecord], RunHistory, BaseException | None]:
    """The steps of an fp16 run that begins with this loss scale, and what ended it."""
    history, failure = RunHistory(), None
    try:
        for event in training(request_for(recipe), history):
            if isinstance(event, StartRecord) and history.worker:
                history.worker.step.scaler.update(scale)
    except NonFiniteError as error:
        failure = error
    return history.steps, history, failure


def adapter_of(history: RunHistory) -> list[torch.Tensor]:
    assert history.worker is not None
    return [p.detach().clone() for p in history.worker.built.peft.parameters() if p.requires_grad]


@pytest.mark.usefixtures("clean_dynamo")
def test_fault_20_an_fp16_overflow_skips_the_update_halves_the_scale_and_holds_the_schedule(
    make_recipe: MakeRecipe,
) -> None:
    sections = {"model": {"dtype": "float16"}, "compile": {"mode": "off"}, "train": {"steps": 24, "schedule": "linear"}}
    steps, history, failure = with_scale(make_recipe(**sections), 2.0**30)
    skipped = sum(step.skipped for step in steps)
    assert failure is None and 2 <= skipped < 20
    assert [step.skipped for step in steps] == [True] * skipped + [False] * (24 - skipped)
    assert history.worker and history.worker.step.scaler.get_scale() == 2.0 ** (30 - skipped)
    assert len({step.lr for step in steps[: skipped + 1]}) == 1, "the schedule is held"
    assert steps[skipped + 1].lr != steps[skipped].lr
    assert all(math.isfinite(step.loss) for step in steps)
    assert all(values.isfinite().all() for values in adapter_of(history))


@pytest.mark.usefixtures("clean_dynamo")
def test_fault_20_twenty_overflows_in_a_row_end_the_run_with_code_5(make_recipe: MakeRecipe) -> None:
    sections = {"model": {"dtype": "float16"}, "compile": {"mode": "off"}, "train": {"steps": 40}}
    steps, history, failure = with_scale(make_recipe(**sections), 2.0**120)
    assert isinstance(failure, NonFiniteError) and failure.code == 5
    assert f"step {SKIPS_IN_A_ROW} has {SKIPS_IN_A_ROW} fp16 steps in a row overflowed" in str(failure)
    assert len(steps) == SKIPS_IN_A_ROW - 1 and all(step.skipped for step in steps)
    assert not any(values.any() for values in adapter_of(history)[1::2]), (
        "no update was made: B is zero as at the start"
    )


@pytest.fixture
def opened(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


def files_of(folder: RunFolder, rank: int) -> RunFiles:
    files = RunFiles(rank)
    files.show(RunOpened(folder.path))
    return files


def status_of(folder: RunFolder) -> dict[str, Any]:
    return dict(json.loads(folder.status.read_text()))


def test_fault_47_an_end_that_may_follow_from_another_never_replaces_the_cause(opened: RunFolder) -> None:
    assert files_of(opened, 1).end(code=143, reason="terminated")
    assert not files_of(opened, 0).end(code=8, reason="rank 1 is gone", rank=1)
    assert status_of(opened)["code"] == 143, "the first"
    assert files_of(opened, 0).end(code=5, reason="nan", step=7)
    for code in (1, 8, 130, 143, 7):
        assert not files_of(opened, 1).end(code=code, reason="follows")
    assert (status_of(opened)["code"], status_of(opened)["step"], status_of(opened)["rank"]) == (5, 7, 0)


@pytest.mark.parametrize("links", [True, False])
def test_fault_47_of_two_ranks_that_end_at_one_moment_the_first_to_write_stays(
    opened: RunFolder, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    write = run_files.write_json

    def other_first(path: Path, content: dict[str, Any]) -> None:
        monkeypatch.setattr(run_files, "write_json", write)
        assert files_of(opened, 0).end(code=7, reason="disk full")
        write(path, content)

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(run_files, "write_json", other_first)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    assert not files_of(opened, 1).end(code=5, reason="nan")
    assert status_of(opened)["code"] == 7
    assert not list(opened.path.glob("*.part"))


def test_fault_47_the_status_names_the_rank_to_blame(opened: RunFolder) -> None:
    files_of(opened, 0).end(code=8, reason="rank 3 was silent", rank=3, step=0)
    assert (status_of(opened)["rank"], status_of(opened)["step"]) == (3, 0)
