"""Disks that are full or fail: what was trained is kept, and no half of a file is left."""

import errno
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from launcher import api
from launcher.checkpoint import adapter, run_files
from launcher.checkpoint import bundle as bundles
from launcher.checkpoint.bundle import newest_state, read_bundle, step_of, write_bundle
from launcher.checkpoint.files import write_json
from launcher.checkpoint.folder import RunFolder
from launcher.checkpoint.run_files import RunFiles
from launcher.errors import CheckpointError, DiskError, FolderError, LauncherError
from launcher.records.run import EvalRecord, RunOpened, StepRecord
from launcher.train import rescue
from tests.support.arguments import replaced
from tests.support.bundles import STATE, written
from tests.support.launches import MAIN, finished
from tests.support.runs import trained

pytestmark = pytest.mark.usefixtures("clean_dynamo")

WEIGHTS = "adapter_model.safetensors"
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
STEP = StepRecord(1, 2.5, 1e-3, 1.0, 9, 9, 1.0, 1.0)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def arguments(small_arguments: tuple[str, ...], tmp_path: Path) -> list[str]:
    """A run of three steps without checkpoints, after the name of its recipe."""
    (tmp_path / "elsewhere").mkdir()
    return replaced(
        small_arguments[1:], "compile.mode=off", "train.steps=3", "train.save_every=off", "run.sample_tokens=0",
        f"run.output_dir={tmp_path / 'run'}", f"run.rescue_dir={tmp_path / 'elsewhere'}",
    )  # fmt: skip


def saved_by_a_whole_run(arguments: list[str], folder: Path) -> Path:
    """The adapter of the same run on a disk that takes it."""
    api.run("tiny", *replaced(arguments, f"run.output_dir={folder}"), quiet=True)
    return folder / "adapter"


def may_mount() -> bool:
    """Whether this user may mount a file system, in a namespace of its own."""
    command = "unshare -rm mount -t tmpfs none /mnt"
    return subprocess.run(command, shell=True, stderr=subprocess.DEVNULL).returncode == 0


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel writes of each file what fits into `size` bytes, as on a disk that fills, then refuses."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Exception("No space left on device (os error 28)"), 7),  # of tokenizers
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), 4),
    ],
)
def test_fault_38_an_adapter_that_cannot_be_saved_is_saved_elsewhere(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, code: int
) -> None:
    expected, original = saved_by_a_whole_run(arguments, tmp_path / "whole"), adapter.save_tensors

    def save(model: Any, tensors: Any, target: Path) -> None:
        original(model, tensors, target)
        if target.is_relative_to(tmp_path / "run"):
            raise fault
        os.kill(os.getpid(), signal.SIGTERM)  # of a launcher, since another rank has ended

    monkeypatch.setattr(adapter, "save_tensors", save)
    with pytest.raises(LauncherError, match="After step 3 the adapter was saved in") as caught:
        api.run("tiny", *arguments, quiet=True)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (caught.value.code, status["code"], status["reason"]) == (code, code, str(caught.value))
    [kept] = (tmp_path / "elsewhere").iterdir()
    assert str(kept) in str(caught.value)
    assert {path.name: path.read_bytes() for path in kept.iterdir() if path.name != "README.md"} == {
        path.name: path.read_bytes() for path in expected.iterdir() if path.name != "README.md"
    }
    stock = get_peft_model_state_dict(AutoPeftModelForCausalLM.from_pretrained(kept))
    assert all(torch.equal(stock[name], tensor) for name, tensor in load_file(expected / WEIGHTS).items())
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EACCES, errno.ESTALE, errno.ENOTCONN])
@pytest.mark.parametrize("library", [False, True])
def test_fault_38_whatever_the_system_refuses_a_save_for_has_its_code(
    tmp_path: Path, number: int, library: bool
) -> None:
    text = os.strerror(number)
    fault = SafetensorError(f"I/O error: {text} (os error {number})") if library else OSError(number, text)

    def fail(target: Path) -> None:
        target.mkdir()
        raise fault

    on_disk = number in (errno.EDQUOT, errno.EIO, errno.EFBIG)
    with pytest.raises(DiskError if on_disk else FolderError, match=text) as caught:
        write_bundle(tmp_path / "checkpoints", STATE, step=3, adapter=fail)
    assert caught.value.code == (7 if on_disk else 4)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_fault_38_the_first_place_that_takes_the_adapter_keeps_it_and_the_others_are_left_clean(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose metrics can no longer be written, and a rescue for which one of three places is full and one takes
    what it does not keep."""
    original_append, original_save = run_files.append_text, rescue.save_adapter
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    full, current = [tmp_path / "run"], tmp_path / "current"
    current.mkdir()
    monkeypatch.chdir(current)

    def append(path: Path, line: str) -> None:
        if json.loads(line)["step"] == 2:
            shutil.rmtree(current, ignore_errors=True)  # the last place of all is gone
            raise FULL
        original_append(path, line)

    def save(model: Any, tokenizer: Any, target: Path) -> None:
        original_save(model, tokenizer, target)
        if target.is_relative_to(tmp_path / "elsewhere"):
            (target / WEIGHTS).write_bytes(b"")
        elif any(target.is_relative_to(place) for place in full):
            raise FULL

    monkeypatch.setattr(run_files, "append_text", append)
    monkeypatch.setattr(rescue, "save_adapter", save)
    with pytest.raises(DiskError, match=r"metrics\.jsonl needs .*are free(?s:.*)After step 2 the adapter was saved"):
        api.run("tiny", *arguments, quiet=True)
    [kept] = (tmp_path / "temporary").iterdir()
    assert {WEIGHTS, "tokenizer.json"} <= {path.name for path in kept.iterdir()}
    assert not list((tmp_path / "elsewhere").iterdir()) and not list((tmp_path / "run").rglob(WEIGHTS))
    full += [tmp_path]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DiskError, match=f"(?s)could be saved nowhere:.*elsewhere.*temporary.*{tmp_path}"):
        api.run("tiny", *arguments, quiet=True)


def test_fault_29_on_a_disk_that_is_full_to_its_last_byte_the_status_takes_the_place_of_the_lock_files_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, files, original = RunFolder(tmp_path / "run"), RunFiles(0), run_files.write_json
    run.create()
    files.show(RunOpened(run.path))

    def write(path: Path, content: dict[str, Any]) -> None:
        if (run.path / "run.lock").stat().st_size:
            raise FULL
        original(path, content)

    monkeypatch.setattr(run_files, "write_json", write)
    files.end(code=7, reason="the disk is full")
    assert run.code == 7
    with pytest.raises(CheckpointError, match="must not be in use"):
        RunFolder(run.path).lock()
    run.status.unlink()
    (run.path / "run.lock").write_text("more")

    def never(*_: Any) -> None:
        raise FULL

    monkeypatch.setattr(run_files, "write_json", never)
    for _ in range(2):  # also where there is no more to give
        with pytest.raises(OSError, match="No space"):
            files.end(code=7, reason="the disk is full")


@pytest.mark.faults
@pytest.mark.skipif(not may_mount(), reason="no file system can be mounted here")
def test_fault_38_a_full_disk_costs_no_training_and_its_status_still_fits(arguments: list[str], tmp_path: Path) -> None:
    """A real disk of 1 MiB, filled to the last byte during the run: the adapter has 70 KB, the tokenizer 260 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    run = shlex.join([sys.executable, str(MAIN), "recipe=tiny", *replaced(arguments, f"run.output_dir={disk}/run")])
    fill = f"while [ ! -s {disk}/run/metrics.jsonl ]; do sleep 0.1; done; cat /dev/zero > {disk}/filler"
    script = (
        f"mount -t tmpfs -o size=1m none {disk} || exit 99; ({fill}) & filler=$!; {run}; rc=$?; "
        f"kill $filler; cp -r {disk}/run copy; exit $rc"
    )
    done = finished("unshare", "-rm", "bash", "-c", script, cwd=tmp_path)
    assert done.returncode == 7, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    status = json.loads((tmp_path / "copy" / "status.json").read_text())
    [kept] = (tmp_path / "elsewhere").iterdir()
    assert (status["code"], str(kept) in status["reason"], str(kept) in done.stderr) == (7, True, True)
    assert (kept / WEIGHTS).stat().st_size > 10_000
    assert not list((tmp_path / "copy").rglob("*.part"))
    assert all(json.loads(line) for line in (tmp_path / "copy" / "metrics.jsonl").read_text().splitlines())


def test_fault_29_a_line_of_metrics_is_whole_or_absent_on_a_full_disk(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    files = RunFiles(0)
    for event in (RunOpened(run.path), EvalRecord(0, 3.0)):
        files.show(event)
    before = run.metrics.read_text()
    with largest_file(len(before) + 20), pytest.raises(DiskError, match=r"metrics\.jsonl needs more than \d+ bytes"):
        files.show(STEP)
    assert run.metrics.read_text() == before
    files.show(STEP)
    assert len(run.metrics.read_text().splitlines()) == 2


def test_fault_29_a_json_file_that_finds_no_room_leaves_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    write_json(file, {"code": 1})
    with largest_file(4), pytest.raises(OSError, match="too large"):
        write_json(file, {"code": 7, "reason": "the disk is full"})
    assert json.loads(file.read_text()) == {"code": 1} and list(tmp_path.iterdir()) == [file]


def test_fault_29_a_full_disk_is_code_7_with_the_bytes_and_leaves_no_staging(checkpoints: Path) -> None:
    written(checkpoints, 1)
    with (
        largest_file(64),
        pytest.raises(DiskError, match=r"needs more than 25 bytes; [\d,]+ are free") as caught,
    ):
        written(checkpoints, 2)
    assert caught.value.code == 7
    assert [path.name for path in checkpoints.iterdir()] == ["step-1"]
    read_bundle(checkpoints / "step-1")


def test_fault_29_a_checkpoint_that_does_not_fit_ends_the_run_and_its_adapter_is_kept_alone(
    make_recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, saved = bundles.save_file, list[Path]()

    def save(tensors: Any, path: Path) -> None:
        saved.append(path)
        if len(saved) == 2:
            raise FULL
        original(tensors, path)

    monkeypatch.setattr(bundles, "save_file", save)
    with pytest.raises(DiskError, match=r"are free(?s:.*)After step (\d) the adapter was saved in") as caught:
        trained(make_recipe(compile={"mode": "off"}, train={"steps": 8, "save_every": 2}))
    older, kept = sorted((tmp_path / "run" / "checkpoints").iterdir(), reverse=True)
    assert older.name == "step-2" and step_of(newest_state(older.parent)[0]) == 2
    assert str(kept) in str(caught.value)
    weights = [load_file(place / WEIGHTS) for place in (older / "adapter", kept)]
    assert weights[0].keys() == weights[1].keys() and any(not weights[0][n].equal(weights[1][n]) for n in weights[0])


def test_fault_29_what_a_checkpoint_holds_already_is_named_and_not_saved_twice(
    make_recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise FULL

    monkeypatch.setattr(adapter, "save_adapter", full)
    with pytest.raises(DiskError, match=r"After step 4 the adapter is in .*/checkpoints/step-4/adapter"):
        trained(make_recipe(compile={"mode": "off"}))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-4"]
