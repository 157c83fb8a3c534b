"""Runs side by side: what differs is found, and nothing else."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.commands.compare import compare_runs, comparison
from launcher.commands.finished_run import Invocation
from launcher.commands.report import report_run
from launcher.commands.run_command import run_command
from launcher.errors import RecipeError
from launcher.preflight.before_torch import check_report
from launcher.recipe.run_options import CompareOptions, ReportOptions, read_options
from launcher.records.run import EvalRecord, RunRecord, Verdict
from launcher.runtime.ranks import RankInfo
from tests.support.records import rank_record, run_record, section, shown, start_record, step_record

RECIPE = {"train": {"save_every": "10m", "lr": 2e-4}, "model": {"name": "m"}, "run": {"output_dir": "a"}}


def run_of(*, lr: float = 2e-4, every: int = 1, folder: str = "/a", **changes: Any) -> RunRecord:
    recipe = {**RECIPE, "train": {**RECIPE["train"], "lr": lr}, "run": {"output_dir": folder}}
    record = run_record(recipe=recipe, start=start_record(run_dir=folder), steps=8)
    return replace(record, **{"steps": tuple(s for s in record.steps if s.step % every == 0), **changes})


def invocation(report: Path | None = None) -> Invocation:
    return Invocation(RankInfo(0, 0, 1, 1), Console(file=io.StringIO(), width=120, force_terminal=False), report)


def test_only_what_differs_is_shown_a_column_for_each_run() -> None:
    text = shown(comparison([run_of(), run_of(lr=1e-3, folder="/b"), run_of(folder="/c")]))
    assert section(text, "Recipe")[3] == "train.lr 0.0002 0.001 0.0002" and "1 of 4 keys differ" in text
    assert "output_dir" not in text and "Chosen or found" not in text and "C /c" in " ".join(text.split())
    assert "no key differs" in shown(comparison([run_of(), run_of(folder="/b")]))


def test_what_keys_and_figures_show_stands_once_and_epochs_are_rounded() -> None:
    starts = [start_record(optimizer=f"adamw, lr {n}", steps=n, epochs=n / 3) for n in (1, 2)]
    record = comparison([replace(run_of(), start=start, eval_adapter=1.25) for start in starts])
    assert record.start == {"epochs": (0.33, 0.67)}
    assert record.figures["steps"] == (8, 8) and record.figures["eval loss of the adapter"] == (1.25, 1.25)


def test_losses_stand_side_by_side_where_both_runs_have_the_step() -> None:
    other = run_of(every=2, folder="/b", evals=(EvalRecord(0, 3.0), EvalRecord(4, 2.0)))
    record = comparison([run_of(), other])
    assert list(record.losses) == [2, 4, 6, 8] and list(record.eval_losses) == [0]
    assert record.losses[4] == (2.5 / 1.2, 2.5 / 1.2) and record.eval_losses[0] == (2.9134, 3.0)
    apart = comparison([run_of(steps=(step_record(1),)), run_of(steps=(step_record(2),))])
    assert "the runs have no step in common" in shown(apart)


def test_figures_tell_the_change_from_the_first_run_and_events_are_alarming() -> None:
    slow = replace(run_record(rank_record(0, recompiles=2)).ranks[0], tokens_per_s=37_656.2)
    text = " ".join(shown(comparison([run_of(), run_of(ranks=(slow,))])).split())
    assert "75,312 37,656 (-50.0 %)" in text and "recompiles 0 2" in text and "peak memory MiB 7,491 7,491" in text


def test_other_hardware_and_other_amounts_of_data_are_said() -> None:
    other = replace(run_of(), start=start_record(device="NVIDIA H100"), steps=(step_record(1, tokens=99),))
    text = shown(comparison([run_of(), other]))
    assert "different hardware" in text and "device" in "".join(section(text, "Chosen or found"))
    assert "31,871, 99 tokens on average" in " ".join(text.split())
    assert "different hardware" not in shown(comparison([run_of(), run_of()]))


def test_versions_that_differ_are_shown() -> None:
    first, other = run_of(versions={"torch": "2.11.0", "peft": "0.21.0"}), run_of(versions={"torch": "2.13.0"})
    text = shown(comparison([first, other, replace(other, versions={"torch": "2.13.0", "peft": "0.21.0"})]))
    assert section(text, "Versions")[3:5] == ["torch 2.11.0 2.13.0 2.13.0", "peft 0.21.0 - 0.21.0"]
    assert "Versions" not in shown(comparison([first, first]))


def test_verdicts_are_matched_by_claim() -> None:
    other = run_of(verdicts=(Verdict("no graph break", False, "1"), Verdict("learned", True, "")))
    rows = section(shown(comparison([run_of(), other])), "Verdicts")
    assert "no graph break PASS FAIL" in rows and "learned PASS" in rows


def test_the_report_has_the_same_and_unfinished_runs_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(run_of(folder=name).as_report()))
    (tmp_path / "note.txt").touch()
    options = read_options(["mode=compare", f"runs={tmp_path}/*"], "compare")
    assert options == CompareOptions(runs=[f"{tmp_path}/a/", f"{tmp_path}/b/"])
    for _ in range(2):  # it may take its own place
        check_report(tmp_path / "out.json")
        compare_runs(options, invocation(tmp_path / "out.json"))
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["schema"], report["mode"]) == (1, "compare")
    assert report["runs"] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert report["figures"]["tokens/s"] == [75_312.4, 75_312.4]
    (tmp_path / "b" / "report.json").rename(tmp_path / "b" / "metrics.jsonl")
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    with pytest.raises(RecipeError, match=rf"must have come to their end; {tmp_path}/b/ has not"):
        compare_runs(options, invocation())


def test_a_folder_whose_name_is_like_a_pattern_is_itself(tmp_path: Path) -> None:
    for name in ("c[1]", "c1", "c2"):
        (tmp_path / name).mkdir()
    given = [f"{tmp_path}/c[1]", f"{tmp_path}/c[12]"]
    assert CompareOptions(runs=given).runs == [f"{tmp_path}/c[1]", f"{tmp_path}/c1/", f"{tmp_path}/c2/"]


def test_a_report_into_one_of_the_runs_is_refused_and_that_one_stays(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
        (tmp_path / name / "report.json").write_text(json.dumps(run_of(folder=name).as_report()))
    own = tmp_path / "a" / "report.json"
    before, words = own.read_text(), ["mode=compare", f"runs=[{tmp_path}/a, {tmp_path}/b]", f"report={own}"]
    with pytest.raises(RecipeError, match="report=PATH must not be in a run's folder"):
        run_command(words, invocation().rank_info, invocation().console)
    assert own.read_text() == before


def test_a_page_replaces_only_an_earlier_page(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(run_of().as_report()))
    page = tmp_path / "page.html"
    for _ in range(2):
        report_run(ReportOptions(run=str(tmp_path), html=str(page)), invocation())
        assert page.read_text(encoding="utf-8").endswith("</html>\n")
    page.write_text("mine")
    (tmp_path / "link.html").symlink_to("nowhere")
    for refused in (page, tmp_path, tmp_path / "no" / "page.html", tmp_path / "link.html"):
        with pytest.raises(RecipeError, match="html must be"):
            report_run(ReportOptions(run=str(tmp_path), html=str(refused)), invocation())
    assert page.read_text() == "mine"


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("runs=a", "at least 2; got ['a']"),
        ("runs=[a", "put the list in single quotes"),
        ("runs=", "runs must be"),
        ("runs=[a, b, ./gone-*]", "got './gone-*', which matches none"),
        ("run=a", "did you mean runs?"),
        (f"runs=[{', '.join('a' * 27)}]", "runs must be"),
    ],
)
def test_runs_must_be_a_list_of_several(argument: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_options(["mode=compare", argument], "compare")
    assert says in str(caught.value)
