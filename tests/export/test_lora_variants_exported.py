"""A run of each variant of the adapters: its planned graphs, and an adapter and exports that are what was trained."""

import json
from pathlib import Path

import pytest

from launcher.export import merge
from tests.conftest import TINY
from tests.export.conftest import Main, trained

pytestmark = pytest.mark.slow
with_rows = merge._with_rows
VARIANTS = {
    "some layers, ranks and scales": (
        ("lora.layers=1", "lora.targets=all-linear", "lora.rank_pattern={down_proj: 2}", "lora.rslora=true"),
        2,  # kinds of layers
    ),
    "dora": (("lora.dora=true", "lora.layers=1", "lora.init=orthogonal"), 2),
    "pissa": (("lora.init=pissa", "lora.rslora=true", "lora.layers=1", "lora.rank_pattern={down_proj: 2}"), 2),
    "trained tokens": (("lora.trainable_tokens=<|user|>,<|end|>",), 1),
    "trained tokens of a tied head": ((f"model.name={TINY / 'base'}", "lora.trainable_tokens=<|user|>,<|end|>"), 1),
    "expressions": (("lora.targets=re:.*proj", r"lora.alpha_pattern={'layers\.0\..*q_proj': 8}"), 2),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_in_its_planned_graphs_and_is_exported_as_trained(
    variant: str, small_arguments: tuple[str, ...], main: Main, tmp_path: Path
) -> None:
    changes, kinds = VARIANTS[variant]
    trained(small_arguments, tmp_path / "run", "train.steps=2", "compile.mode=strict", *changes)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert all(verdict["holds"] for verdict in report["verdicts"]), report["verdicts"]
    compiled = report["ranks"][0]["compile"]
    assert compiled["planned_graphs"] == compiled["expected_graphs"] == 2 * kinds + 2
    for form in ("merged", "gguf", "adapter"):
        done = main("mode=export", "run=run", f"to={form}", f"format={form}", "report=report.json")
        assert done.code == 0, (form, done.err)


def test_a_wrong_scale_in_a_merged_export_is_found(
    small_arguments: tuple[str, ...], main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("lora.rank_pattern={down_proj: 2}", "lora.rslora=true", "train.steps=2")
    trained(small_arguments, tmp_path / "run", *changes)
    monkeypatch.setattr(merge, "_scale", lambda config, name: config.lora_alpha / config.r)
    done = main("mode=export", "run=run", "to=out", "report=report.json")
    assert done.code != 0 and "every written weight is the trained model's" in done.broken


@pytest.mark.parametrize(("form", "on"), [("merged", "original"), ("merged", "dequantised"), ("gguf", "dequantised")])
def test_a_trained_row_that_is_not_exported_is_found(
    small_arguments: tuple[str, ...], main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, on: str
) -> None:
    trained(small_arguments, tmp_path / "run", "train.steps=2", "lora.trainable_tokens=<|user|>,<|end|>")
    monkeypatch.setattr(
        merge, "_with_rows", lambda p, w, rows: with_rows(p, w, merge.RowValues(rows.ids[:1], rows.values[:1]))
    )
    done = main("mode=export", "run=run", "to=out", f"format={form}", f"on={on}", "report=report.json")
    assert done.code != 0 and "every written weight is the trained model's" in done.broken
