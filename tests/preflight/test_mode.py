"""mode=check, and the checks before a run: all that fails comes at once, with the code of the first."""

import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher import cli
from launcher.errors import DiskError, MemoryExhausted, RecipeError
from launcher.preflight.lines import Checks
from launcher.runtime.signals import listening
from tests.support.arguments import replaced

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process, in the test's folder: its arguments -> (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with listening():
            return cli.main(arguments), *capsys.readouterr()

    return run


@pytest.fixture
def small(small_arguments: Sequence[str]) -> list[str]:
    return [*small_arguments, "run.output_dir=out"]


def without_the_weights(small_model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(small_model, folder / "bare", ignore=shutil.ignore_patterns("*.safetensors")))


def test_a_check_that_holds_ends_with_0_and_leaves_only_its_report(
    main: Command, small: list[str], tmp_path: Path
) -> None:
    code, out, err = main(*small, "lora.trainable_tokens=<|end|>", "mode=check", "report=report.json")
    assert (code, err) == (0, "") and "FAIL" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    names = {line["name"] for line in report["checks"]}
    assert {
        "packages",
        "data",
        "run folder",
        "device",
        "bitsandbytes",
        "compiler",
        "weights",
        "trained tokens",
        "disk",
        "memory",
    } <= names
    assert report["holds"] and all(line["holds"] and line["found"] for line in report["checks"])


def test_one_folder_is_named_on_a_page_and_weights_that_are_not_read_are_random(
    main: Command, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(range(100))
    monkeypatch.setattr(
        "launcher.preflight.before_torch.default_folder", lambda name: str(tmp_path / f"at-{next(times)}")
    )
    code, _, err = main(*small[:-1], "model.init=random", "mode=check", "report=report.json")
    assert (code, err) == (0, "")
    found = {line["name"]: line["found"] for line in json.loads((tmp_path / "report.json").read_text())["checks"]}
    assert found["weights"] == "random, none are read"
    assert found["run folder"] == str(tmp_path / "at-0") and found["run folder"] in found["disk"]


def test_everything_that_fails_is_shown_at_once_with_the_code_of_the_first(
    main: Command, small: list[str], small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_the_weights(small_model, tmp_path)
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    wrong = replaced(small, "model.name=./bare", "data.sources=./gone.jsonl")
    code, out, err = main(*wrong, "mode=check", "report=report.json")
    failed = [line for line in json.loads((tmp_path / "report.json").read_text())["checks"] if not line["holds"]]
    assert [(line["name"], line["code"]) for line in failed] == [
        ("data", 3), ("run folder", 4), ("weights", 2), ("source", 3),
    ]  # fmt: skip
    assert code == 3 and out.count("FAIL") == 4
    assert "Complete the checkpoint" in out and "no such file or folder" in " ".join(out.split())
    assert re.fullmatch(
        r"error: a run needs all that is checked; 4 of \d+ fail: data, run folder, weights, source\. \(exit code 3\)",
        err.strip(),
    ), "the page has said the rest"


def test_a_run_tells_what_fails_before_torch_at_once_and_leaves_nothing(
    main: Command, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "peft" else original(name))
    before = sorted(tmp_path.rglob("*"))
    code, _, err = main(*replaced(small, "data.sources=./gone.jsonl", "model.name=./nowhere"))
    assert code == 2
    assert [line.partition(":")[0] for line in err.splitlines()] == ["error", "packages", "model", "data"]
    assert "peft is 0.1. pip install 'peft" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_has_no_room_ends_before_it_loads_anything(
    main: Command, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20, total=2**30))
    code, out, err = main(*small)
    assert code == 7 and "loading model" not in out
    assert [line.partition(":")[0] for line in err.splitlines()] == ["error", "disk", "memory"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("local_rank", "printed"), [("0", True), ("1", False)])
def test_one_process_checks_for_all(
    main: Command, small: list[str], monkeypatch: pytest.MonkeyPatch, local_rank: str, printed: bool
) -> None:
    ranks = {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": "2"}
    for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    code, out, _ = main(*small, "mode=check")
    assert code == 0
    assert out.count("PASS  memory") == 2 * printed


def failing(error: Exception) -> Callable[[], str]:
    def check() -> str:
        raise error

    return check


def test_one_failure_is_raised_as_it_is_and_several_as_the_first_of_them() -> None:
    checks, alone = Checks(), DiskError("full;\nfree space")
    assert checks.add("good", lambda: 7) == 7 and checks.lines[0].found == "7"
    checks.refuse()
    assert checks.add("disk", failing(alone)) is None
    with pytest.raises(DiskError) as caught:
        checks.refuse(local_rank=1)
    assert caught.value is alone and caught.value.reporter == 0  # one process of the machine prints it
    checks.add("memory", failing(MemoryExhausted("small")), own=True)
    checks.add("recipe", failing(RecipeError("odd\ntwo\nlines")))
    with pytest.raises(DiskError, match="\ndisk: full; free space\nmemory: small\nrecipe: odd two lines$") as caught:
        checks.refuse(local_rank=1)
    assert caught.value.reporter == 1  # its memory may be this rank's alone
