"""Caches hold code that is executed and data that is trained on: what others may have written is never read."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from launcher.compile.inductor_cache import TRITON, VARIABLE, prepare_cache
from launcher.data import cache
from launcher.data.pack.buckets import bucket
from launcher.runtime.private_cache import private_cache
from tests.conftest import ROOT
from tests.support.arguments import replaced
from tests.support.documents import documents_of
from tests.support.launches import LAUNCH, MAIN, finished

NAME = "a" * 40


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path) -> Path:
    """An empty cache of the user's, and no folder of compiled code that they have set."""
    for variable in (VARIABLE, TRITON):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qlora-launcher"


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that others can get to, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp()).resolve()
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def mode_of(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def planted(folder: Path, mode: int) -> Path:
    """The folder with a file in it that must not be read, and with this mode."""
    folder.mkdir(parents=True)
    (folder / "planted").touch()
    folder.chmod(mode)
    return folder


def assert_replaced(variable: str, folder: Path, note: str | None, reason: str) -> None:
    """A private, empty folder stands in place of `folder`, and the note says so and why."""
    own = Path(os.environ[variable])
    assert own != folder and mode_of(own) == 0o700 and "planted" not in os.listdir(own)
    assert note is not None and f"compile cache {folder}" in note and reason in note, note


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
def test_fault_42_a_compile_cache_that_others_may_write_is_never_read(home, mode):
    folder = planted(home / "inductor", mode)
    note = prepare_cache(workers=1)
    assert_replaced(VARIABLE, folder, note, f"may be written by others (mode {mode:04o})")
    assert Path(os.environ[TRITON]).is_relative_to(os.environ[VARIABLE])
    assert mode_of(folder) == mode and (folder / "planted").exists(), "what is left tells what has happened"


@pytest.mark.parametrize("variable", [VARIABLE, TRITON])
def test_fault_42_a_folder_that_the_user_has_set_is_not_used_either_if_others_may_write_it(
    monkeypatch, tmp_path, variable
):
    folder = planted(tmp_path / "theirs", 0o777)
    monkeypatch.setenv(variable, str(folder))
    assert_replaced(variable, folder, prepare_cache(workers=1), f"({variable}) may be written by others")
    assert mode_of(folder) == 0o777


def test_fault_42_a_cache_beneath_a_folder_in_which_others_may_put_another_is_not_used(monkeypatch, reachable):
    monkeypatch.setenv("XDG_CACHE_HOME", str(reachable / "shared" / "cache"))
    folder = planted(reachable / "shared" / "cache" / "qlora-launcher" / "inductor", 0o700)
    for mode in (0o755, 0o1777):  # as /tmp: with the sticky bit only the owner moves a folder
        (reachable / "shared").chmod(mode)
        assert private_cache("inductor") == (folder, None)
    for mode in (0o777, 0o775):
        (reachable / "shared").chmod(mode)
        note = prepare_cache(workers=1)
        assert_replaced(VARIABLE, folder, note, f"lies in {reachable / 'shared'}, in which others may write")
        monkeypatch.delenv(VARIABLE)
        monkeypatch.delenv(TRITON)
    reachable.chmod(0o700)  # nobody else gets there
    assert private_cache("inductor") == (folder, None)


def test_fault_42_a_cache_that_holds_what_others_may_have_written_is_not_made_private_but_replaced(home):
    folder = planted(home / "inductor", 0o755)
    planted(folder / "inner", 0o777)
    assert_replaced(VARIABLE, folder, prepare_cache(workers=1), "holds what others may have written")
    assert mode_of(folder) == 0o755


def test_fault_42_a_cache_that_others_could_only_read_becomes_private(home):
    folder = planted(home / "inductor", 0o755)
    assert prepare_cache(workers=1) is None
    assert os.environ[VARIABLE] == str(folder) and mode_of(folder) == 0o700


@pytest.mark.parametrize("mode", [0o500, 0o555])
def test_fault_35_a_read_only_compile_cache_is_left_read_only(home, mode):
    folder = planted(home / "inductor", mode)
    assert_replaced(VARIABLE, folder, prepare_cache(workers=1), "is read-only")
    assert mode_of(folder) == mode


def test_fault_35_another_users_compile_cache_is_not_used(home, monkeypatch):
    folder = planted(home / "inductor", 0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert_replaced(VARIABLE, folder, prepare_cache(workers=1), "belongs to another user")


def test_fault_35_a_temporary_compile_cache_goes_with_its_process(home):
    planted(home / "inductor", 0o777)
    program = "import os; from launcher.compile.inductor_cache import prepare_cache; prepare_cache(workers=1); "
    program += f"print(os.environ['{VARIABLE}'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "qlora-launcher-inductor-" in done.stdout and not Path(done.stdout.strip()).exists()


def test_fault_42_a_cache_is_made_private_whatever_the_umask(home):
    before = os.umask(0)
    try:
        assert private_cache("data") == (home / "data", None)
    finally:
        os.umask(before)
    assert (mode_of(home), mode_of(home / "data")) == (0o700, 0o700)


def entry() -> cache.Entry:
    blocks = bucket(documents_of([4] * 3), np.arange(3), widths=(4,), pad_id=3)
    return cache.Entry(blocks, None, {})


def test_fault_42_prepared_data_that_others_may_have_written_is_not_trained_on(home):
    assert cache.save(entry(), NAME) is None and cache.load(NAME) is not None
    (home / "data").chmod(0o777)
    assert cache.load(NAME) is None
    note = cache.save(entry(), NAME)
    assert note is not None and f"data cache {home / 'data'} may be written by others (mode 0777)" in note
    assert mode_of(home / "data") == 0o777


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "removed"])
def test_fault_46_prepared_data_that_is_damaged_while_it_is_trained_on_changes_nothing(home, damage):
    assert cache.save(entry(), NAME) is None
    loaded = cache.load(NAME)
    [file] = (home / "data").iterdir()
    size = file.stat().st_size
    if damage == "removed":
        file.unlink()
    else:
        os.truncate(file, 0)  # a mapped file would end the process with SIGBUS
        os.truncate(file, size if damage == "zeroed" else 0)
    assert loaded is not None
    now = cache.Entry(loaded.train, None, {})  # whose content is read again
    assert now.content == entry().content
    assert cache.load(NAME) is None, "the next run prepares the data again"


@pytest.mark.faults
def test_fault_35_two_ranks_train_with_a_cold_cache_and_with_one_that_is_not_trusted(
    home, monkeypatch, small_arguments, tmp_path
):
    folder = planted(home / "inductor", 0o777)
    temporary = tmp_path / "temporary"
    temporary.mkdir(mode=0o700)
    own = ["compile.backend=inductor", "compile.scope=regions", "compile.regions=[rmsnorm]", "train.micro_batch=2"]
    command = [*LAUNCH, MAIN, *replaced(list(small_arguments), f"run.output_dir={tmp_path / 'run'}", *own)]
    done = finished(*command, cwd=tmp_path, TMPDIR=str(temporary))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert all(verdict["holds"] for verdict in report["verdicts"])
    assert any(f"compile cache {folder} may be written by others" in note for note in report["start"]["notes"])
    assert os.listdir(folder) == ["planted"] and not list(temporary.glob("qlora-launcher-*"))
