"""mode=bench as a user types it: exit codes, the JSON at report=PATH, no run folder."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import cli
from launcher.errors import RecipeError
from launcher.records.bench import BenchRecord, SideRecord
from tests.conftest import ROOT
from tests.support.records import bench_of, bench_side

MAIN = [sys.executable, str(ROOT / "launcher" / "main.py")]


@pytest.fixture
def arguments(small_model: Path, rows_file: Path) -> list[str]:
    return [
        "recipe=tiny", "mode=bench", f"model.name={small_model}", f"data.sources=[{{path: {rows_file}}}]",
        "data.validation=0", "data.max_length=64", "compile.backend=aot_eager", "proof.bench=2",
        "train.micro_batch=1", "report=b.json",
    ]  # fmt: skip


def test_both_sides_run_in_processes_of_their_own_and_all_that_is_left_is_the_json(
    arguments: list[str], tmp_path: Path
) -> None:
    done = subprocess.run([*MAIN, *arguments], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "PASS" in done.stdout and "FAIL" not in done.stdout
    assert "compile pays back" in done.stdout or "compile never pays back" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]
    report = json.loads((tmp_path / "b.json").read_text())
    assert report.keys() == {
        "schema", "mode", "holds", "recipe", "rows", "start", "compile", "ceiling", "workload", "ours", "naive",
        "speed_up", "memory_ratio", "pay_back_steps", "loss_differences", "loss_tolerance", "verdicts", "notes",
    }  # fmt: skip
    assert report["ours"].keys() == report["naive"].keys() == {
        "phases_s", "first_step_s", "losses", "steps_s", "vram", "peak_allocated_mib", "peak_reserved_mib", "batches",
        "failure", "out_of_memory", "step_ms", "tokens_per_s", "ceiling_share", "before_mib",
    }  # fmt: skip
    assert report["ours"]["step_ms"].keys() == {"median", "p20", "p80"}
    assert report["ours"]["losses"][0] == pytest.approx(report["naive"]["losses"][0], rel=1e-5)
    for name in ("ours", "naive"):  # the whole is what the phases sum up to, and little between them
        whole, phases = report[name]["first_step_s"], sum(report[name]["phases_s"].values())
        assert phases <= whole + 0.05 and whole < phases + 2


@pytest.fixture
def main(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[BenchRecord], int]:
    """The command line's exit code when the measurement gave a record."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)

    def run(found: BenchRecord) -> int:
        monkeypatch.setattr(cli, "bench", lambda request: iter(["a phase", found]))
        return cli.main(arguments)

    return run


def test_losses_that_differ_are_code_9_after_the_tables_and_the_json(
    main: Callable[[BenchRecord], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(bench_of(bench_side(loss=2.6))) == 9
    said = capsys.readouterr()
    assert "✗ FAIL" in said.out and "of the matmul ceiling" in said.out
    assert "both sides must train on the same" in said.err and "(exit code 9)" in said.err
    assert json.loads((tmp_path / "b.json").read_text())["holds"] is False


def test_a_naive_side_that_failed_is_code_1_after_the_tables_and_one_out_of_memory_is_none(
    main: Callable[[BenchRecord], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = bench_side(steps_s=(), failure="out of memory", out_of_memory=True)
    assert main(bench_of(full)) == 0
    assert main(bench_of(SideRecord(failure="its process failed: ZeroDivisionError"))) == 1
    said = capsys.readouterr()
    assert said.out.count("of the matmul ceiling") == 2
    assert "naive must come to its end" in said.err and "ZeroDivisionError" in said.err
    assert json.loads((tmp_path / "b.json").read_text())["ours"]["tokens_per_s"] > 0


def test_several_processes_are_refused_before_anything_is_loaded(
    main: Callable[[BenchRecord], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(bench_of()) == RecipeError.code
    assert "mode=bench runs in one process; 2 were started" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
