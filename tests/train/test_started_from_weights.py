"""Runs with lora.init=pissa and olora: compiled as planned, resumed bit for bit elsewhere too, as stock PEFT has it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launcher.checkpoint.bundle import bundles_of, read_bundle
from launcher.model import lora_start
from launcher.records.run import RunRecord
from launcher.train import state as state_module
from launcher.train.history import RunHistory
from tests.conftest import stock_loss
from tests.support.runs import adapter, events_of, lines, record_of, trained
from tests.support.states import flat

pytestmark = pytest.mark.usefixtures("clean_dynamo")


def states(folder: Path) -> list[dict[str, Any]]:
    """What training left in each checkpoint, newest first."""
    return [read_bundle(bundle)["state"]["training"] for bundle in bundles_of(folder / "checkpoints")]


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the decomposition is another device's: signs and last bits differ."""
    here = lora_start.first_factors

    def there(*arguments: Any, seed: int) -> tuple[Tensor, Tensor]:
        a, b = here(*arguments, seed=seed)
        return -a * (1 + 1e-6), -b

    monkeypatch.setattr(lora_start, "first_factors", there)


@pytest.mark.parametrize(
    "sections",
    [
        {
            "lora": {"init": "pissa", "dropout": 0.2},
            "train": {"optimizer": "muon", "weight_decay": 0.5, "keep_best": True, "keep": 9},
        },
        {"lora": {"init": "olora", "plus_ratio": 4.0}, "model": {"dtype": "float16"}, "train": {"keep": 9}},
    ],
    ids=["pissa", "olora"],
)
def test_a_resumed_run_is_bit_equal_wherever_it_goes_on_and_the_start_never_moves(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: Any
) -> None:
    trained(make("whole", **sections))
    trained(make(**sections), until=5)
    elsewhere(monkeypatch)
    trained(make(**sections))
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    assert flat(states(tmp_path / "run")[0]) == flat(states(tmp_path / "whole")[0])
    last, *_, first = states(tmp_path / "whole")
    assert flat(first["start"]) == flat(last["start"]) and len(last["start"]) == 28
    assert all(not torch.equal(tensor, last["adapters"][name]) for name, tensor in first["adapters"].items())


def test_a_resume_that_computes_the_start_anew_is_seen_by_that_comparison(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"init": "pissa"}
    trained(make("whole", lora=lora))
    trained(make(lora=lora), until=5)
    elsewhere(monkeypatch)
    whole = state_module._copy_into

    def without_start(live: dict[str, Any], saved: dict[str, Any]) -> None:
        whole(live, {key: value for key, value in saved.items() if key != "start"})

    monkeypatch.setattr(state_module, "_copy_into", without_start)
    trained(make(lora=lora))
    assert adapter(tmp_path / "run") != adapter(tmp_path / "whole")


def test_a_compiled_run_begins_at_the_base_keeps_its_contract_and_is_stock_pefts(
    make_recipe: Any, tmp_path: Path
) -> None:
    plain = record_of(make_recipe(run={"output_dir": str(tmp_path / "plain")}, train={"steps": 1}))
    history = RunHistory()
    sections = {"lora": {"init": "pissa"}, "compile": {"mode": "strict"}, "train": {"steps": 4, "lr": 1e-3}}
    record = next(event for event in events_of(make_recipe(**sections), history) if isinstance(event, RunRecord))
    assert all(verdict.holds for verdict in record.verdicts), record.verdicts
    compiled = record.ranks[0].compile
    assert compiled.planned_graphs == compiled.expected_graphs == 4  # one for both layers, and the loss; each twice
    assert record.evals[0].eval_loss == plain.evals[0].eval_loss != record.evals[-1].eval_loss
    assert record.start.trainable == plain.start.trainable
    assert record.start.parameters == plain.start.parameters + plain.start.trainable
    found = stock_loss(history, tmp_path, dtype="float32", device="cpu")
    assert found == pytest.approx(record.evals[-1].eval_loss, rel=1e-5)
