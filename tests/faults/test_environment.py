"""Environments that a run does not expect: it works there, or ends with a message and code 2."""

import os
import pwd
import shutil
import stat
import sys
from pathlib import Path

import pytest

from launcher import cli
from launcher.compile.inductor_cache import TRITON, VARIABLE, prepare_cache
from launcher.runtime.environment import prepare_environment
from launcher.runtime.private_cache import private_cache
from tests.conftest import TINY
from tests.support.launches import ALONE, LAUNCH_ONE, MAIN, finished

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # else Python uses UTF-8 there
SHORT = (
    "compile.mode=off", "train.steps=1", "train.micro_batch=1", "data.max_length=128", "run.sample_tokens=0",
    "data.validation=0", "train.save_every=off",
)  # fmt: skip


@pytest.fixture
def without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user id that passwd does not know."""

    def unknown(user: object) -> None:
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME", VARIABLE, TRITON):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("without_home")
def test_a_user_without_a_home_gets_a_private_temporary_one_and_is_told() -> None:
    notes = prepare_environment()
    home = Path(os.environ["HOME"])
    assert stat.S_IMODE(home.stat().st_mode) == 0o700 and "nothing is cached" in notes[0]
    folder, unusable = private_cache("launches")
    assert unusable is None and folder.is_relative_to(home) and prepare_cache(workers=1) is None
    assert prepare_environment() == ()
    shutil.rmtree(home)


@pytest.mark.parametrize("arguments", [("recipe=~nosuch/x.yaml",), ("recipe=tiny", "model.name=~nosuch/x")])
def test_the_home_of_an_unknown_user_is_a_path_that_does_not_exist(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert cli.main(arguments) == 2
    assert "~nosuch/x" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["show", "train"])
def test_a_current_folder_that_was_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    try:
        assert cli.main(["recipe=tiny", f"mode={mode}"]) == 2
    finally:
        os.chdir(tmp_path)
    assert "the current folder must exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "command"),
    [("pydantic", ALONE), ("torch", ALONE), ("pydantic", LAUNCH_ONE)],  # accelerate itself imports torch
    ids=["pydantic", "torch", "launched"],
)
def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path, package: str, command: list[str]) -> None:
    (tmp_path / "broken" / package).mkdir(parents=True)
    (tmp_path / "broken" / package / "__init__.py").write_text("raise OSError('libfoo.so.1: cannot open')")
    done = finished(*command, MAIN, "recipe=tiny", *SHORT, cwd=tmp_path, PYTHONPATH=str(tmp_path / "broken"))
    ours = done.stderr.partition("Traceback")[0]  # a launcher's own may follow
    assert done.returncode == (2 if command is ALONE else 1), done.stderr
    assert f"{package} is not (" in ours and "OSError: libfoo.so.1" in ours and f"--no-deps '{package}" in ours
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def accented(tmp_path: Path) -> Path:
    """A folder whose name is not ASCII, with a recipe, its base and its data."""
    folder = tmp_path / "Größe 数据"
    shutil.copytree(TINY / "base", folder / "modèle")
    with open(TINY / "train.jsonl", encoding="utf-8") as rows:
        (folder / "données.jsonl").write_text("".join(next(rows) for _ in range(40)), encoding="utf-8")
    sections = "model: {name: ./modèle}\ndata: {sources: [./données.jsonl]}\ntrain: {steps: 1}\n"
    (folder / "reçu.yaml").write_text(sections, encoding="utf-8")
    return folder


def test_names_that_are_not_ascii_are_read_and_shown_under_an_ascii_locale(accented: Path, tmp_path: Path) -> None:
    arguments = [f"recipe={accented / 'reçu.yaml'}", f"data.validation={{path: {accented}/données.jsonl}}"]
    done = finished(*ALONE, MAIN, *arguments, "mode=show", cwd=tmp_path, **ASCII)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii() and r"mod\xe8le" in done.stdout
    finished(sys.executable, "-X", "utf8=0", MAIN, arguments[0], cwd=tmp_path, timeout_s=60, **ASCII)  # not for ever


@pytest.mark.faults
def test_a_run_in_folders_that_are_not_ascii_trains_under_an_ascii_locale(accented: Path, tmp_path: Path) -> None:
    arguments = [f"recipe={accented / 'reçu.yaml'}", f"run.output_dir={accented / 'läuft'}", *SHORT]
    done = finished(*ALONE, MAIN, *arguments, cwd=tmp_path, TMPDIR=str(tmp_path / "nowhere"), **ASCII)
    assert done.returncode == 0, done.stderr
    assert (accented / "läuft" / "adapter" / "adapter_model.safetensors").exists() and done.stdout.isascii()
