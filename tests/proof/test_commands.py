"""mode=parity and mode=bench as a user types them: exit codes, the JSON at report=PATH, no run folder."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.errors import RecipeError
from launcher.records.bench import SideRecord
from launcher.records.proof import ProofRecord
from launcher.records.run import Verdict
from tests.conftest import ROOT
from tests.support.records import bench_of, bench_side, parity_record

Main = Callable[..., int]


@pytest.fixture
def arguments(small_model: Path, rows_file: Path) -> list[str]:
    return [
        "recipe=tiny", f"model.name={small_model}", f"data.sources=[{{path: {rows_file}}}]", "data.validation=0",
        "data.max_length=64", "compile.backend=aot_eager", "proof.parity=1", "proof.bench=2", "train.micro_batch=1",
        "report=report.json",
    ]  # fmt: skip


def run_main(mode: str, arguments: list[str], folder: Path) -> tuple[str, dict[str, Any]]:
    """What a process that succeeds prints, and its report, which is all that it leaves."""
    command = [sys.executable, str(ROOT / "launcher" / "main.py"), f"mode={mode}", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=folder)
    assert process.returncode == 0, process.stderr
    assert "\x1b" not in process.stdout and "PASS" in process.stdout and "FAIL" not in process.stdout
    assert [path.name for path in folder.iterdir()] == ["report.json"]
    return process.stdout, json.loads((folder / "report.json").read_text())


@pytest.fixture
def main(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    """The exit code of a command line in this process. With `record`, its mode yields that and measures nothing."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)

    def run(mode: str, record: ProofRecord | None = None) -> int:
        if record is not None:
            for name in ("launcher.cli.bench", "launcher.proof.parity.parity"):
                monkeypatch.setattr(name, lambda request: iter(["a phase", record]))
        return cli.main([f"mode={mode}", *arguments])

    return run


def test_parity_within_the_gate_leaves_only_its_report(arguments: list[str], tmp_path: Path) -> None:
    printed, report = run_main("parity", arguments, tmp_path)
    assert "Adapter gradients" in printed
    assert report.keys() == {
        "schema", "mode", "holds", "recipe", "start", "compile", "gate", "batches", "adapters", "lengths", "loss_error",
        "gradient_error", "verdicts", "elapsed_s", "notes",
    }  # fmt: skip
    assert report["holds"] is True and report["recipe"]["proof"]["parity"] == 1
    assert {f"{a['kind']} {a['matrix']}" for a in report["adapters"]} == {
        f"{kind} {matrix}" for kind in ("q", "k", "v", "o", "gate", "up", "down") for matrix in "AB"
    }
    [batch] = report["batches"]
    assert batch["loss"]["compiled"] == pytest.approx(batch["reference_loss"], rel=1e-4)


def test_bench_measures_both_sides_in_processes_of_their_own_and_leaves_only_its_report(
    arguments: list[str], tmp_path: Path
) -> None:
    printed, report = run_main("bench", arguments, tmp_path)
    assert "compile pays back" in printed or "compile never pays back" in printed
    assert report.keys() == {
        "schema", "mode", "holds", "recipe", "rows", "start", "compile", "ceiling", "workload", "ours", "naive",
        "plain", "to_plain",
        "speed_up", "memory_ratio", "pay_back_steps", "loss_differences", "loss_tolerance", "verdicts", "notes",
    }  # fmt: skip
    for side in (report["ours"], report["naive"], report["plain"]):
        assert side.keys() == {
            "phases_s", "first_step_s", "losses", "steps_s", "vram", "peak_allocated_mib", "peak_reserved_mib",
            "batches", "failure", "out_of_memory", "step_ms", "tokens_per_s", "ceiling_share", "before_mib",
        }  # fmt: skip
        assert side["step_ms"].keys() == {"median", "p20", "p80"}
        assert side["losses"][0] == pytest.approx(report["naive"]["losses"][0], rel=1e-5)
        phases_s = sum(side["phases_s"].values())  # the whole time but for a little between them
        assert phases_s - 0.05 <= side["first_step_s"] < phases_s + 2


@pytest.mark.parametrize(
    ("record", "table", "rule"),
    [
        (
            parity_record(verdicts=(Verdict("loss", False, "large"),) * 4),
            "Adapter gradients",
            "must compute what stock",
        ),
        (bench_of(bench_side(loss=2.6)), "of the matmul ceiling", "both sides must train on the same"),
    ],
)
def test_a_claim_that_does_not_hold_is_code_9_after_the_tables_and_the_report(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], record: ProofRecord, table: str, rule: str
) -> None:
    assert main(record.mode, record) == 9
    printed = capsys.readouterr()
    assert "✗ FAIL" in printed.out and table in printed.out
    assert rule in printed.err and "(exit code 9)" in printed.err
    assert len(printed.err[printed.err.index("error: ") :].strip().splitlines()) <= 5
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text())["holds"] is False


def test_a_naive_side_that_failed_is_code_1_after_the_tables_and_one_out_of_memory_is_code_0(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("bench", bench_of(bench_side(steps_s=(), failure="out of memory", out_of_memory=True))) == 0
    assert main("bench", bench_of(SideRecord(failure="its process failed: ZeroDivisionError"))) == 1
    printed = capsys.readouterr()
    assert printed.out.count("of the matmul ceiling") == 2
    assert "naive must come to its end" in printed.err and "ZeroDivisionError" in printed.err
    assert json.loads((tmp_path / "report.json").read_text())["ours"]["tokens_per_s"] > 0


@pytest.mark.parametrize("mode", ["parity", "bench"])
def test_several_processes_are_refused_before_anything_is_loaded(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    started = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    assert main(mode) == RecipeError.code
    assert f"mode={mode} runs in one process; 2 were started" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
