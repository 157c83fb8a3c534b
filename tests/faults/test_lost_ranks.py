"""A rank that is killed, stopped or asleep ends the whole group; the checkpoints stay whole."""

import json
import time
from pathlib import Path

import pytest

from launcher.checkpoint.bundle import bundles_of, faults_of, step_of
from tests.support.arguments import replaced
from tests.support.launches import LAUNCH, ended, family_of_process, seconds_until_gone, started, wait_until

pytestmark = pytest.mark.faults
PLANTED = Path(__file__).with_name("planted.py")
OPTIONS = ("compile.mode=off", "train.steps=6", "train.micro_batch=1", "train.save_every=1", "run.sample_tokens=0")
TIMEOUT_S = 5


@pytest.mark.parametrize(
    ("fault", "rank", "limit_s", "says"),
    [
        pytest.param("sleep", 1, TIMEOUT_S + 10, "kept the others waiting for run.timeout=5s", id="sleep"),
        pytest.param("stop", 0, TIMEOUT_S + 10, "was silent for run.timeout=5s", id="stop"),
    ],
)
def test_fault_23_a_rank_that_sleeps_or_is_stopped_ends_all_within_its_timeout_and_ten_seconds(
    small_arguments: tuple[str, ...], tmp_path: Path, fault: str, rank: int, limit_s: float, says: str
) -> None:
    assert_group_ends(small_arguments, tmp_path, fault=fault, rank=rank, limit_s=limit_s, says=says)


def test_fault_24_a_rank_that_is_killed_ends_all_within_ten_seconds(
    small_arguments: tuple[str, ...], tmp_path: Path
) -> None:
    assert_group_ends(small_arguments, tmp_path, fault="kill", rank=1, limit_s=10, says="ended without a word")


def assert_group_ends(
    arguments: tuple[str, ...], folder: Path, *, fault: str, rank: int, limit_s: float, says: str
) -> None:
    run, moment = folder / "run", folder / "moment"
    argv = replaced(arguments, *OPTIONS, f"run.timeout={TIMEOUT_S}s", f"run.output_dir={run}")
    process = started(*LAUNCH, PLANTED, fault, rank, moment, *argv, cwd=folder)
    wait_until(moment.exists, process=process)
    seconds_until_gone(family_of_process(process), timeout_s=limit_s + 30)
    done = ended(process)
    assert time.monotonic() - float(moment.read_text()) < limit_s, done.stderr
    status = json.loads((run / "status.json").read_text())
    assert (status["code"], status["rank"], status["step"], status["resumable"]) == (8, rank, 2, True)
    assert f"rank {rank} {says}" in status["reason"] and "its last step 2" in status["reason"]
    assert done.stderr.count(status["reason"]) == 1
    bundles = list(bundles_of(run / "checkpoints"))
    assert bundles and step_of(bundles[0]) <= 2
    assert [fault for bundle in bundles for fault in faults_of(bundle)] == []
