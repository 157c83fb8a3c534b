"""Runs whose adapter begins with lora.init=loftq or eva: compiled as planned, resumed, loaded by stock PEFT."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import RecipeError
from launcher.proof.bench import side
from launcher.proof.bench.workload import WARM_UP_STEPS
from launcher.records.run import RunRecord
from launcher.train import adapter_start
from launcher.train.history import RunHistory
from launcher.train.request import Request
from tests.conftest import request_for, stock_loss
from tests.support.runs import adapter, events_of, lines, record_of, trained

INITS = ["loftq", "eva"]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.usefixtures("clean_dynamo")
def test_a_run_compiles_what_was_planned_and_stock_peft_loads_what_it_leaves(
    make_recipe: Any, tmp_path: Path, init: str
) -> None:
    history = RunHistory()
    events = events_of(make_recipe(lora={"init": init}), history)
    record = next(event for event in events if isinstance(event, RunRecord))
    holding = {verdict.claim for verdict in record.verdicts if verdict.holds}
    assert {"zero recompiles", "exactly the planned graphs", "every step ran compiled"} <= holding
    assert ("start is nearer to the base's files" in holding) == (init == "loftq")
    assert record.elapsed_s[f"{init} start"] > 0
    stock = stock_loss(history, tmp_path, dtype="float32", device="cpu")
    assert stock == pytest.approx(history.evals[-1].eval_loss, rel=1e-3)
    assert stock != pytest.approx(history.evals[0].eval_loss, rel=1e-3)
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True and not saved.get("eva_config") and not saved.get("loftq_config")


def test_the_loss_of_evas_start_is_the_bases_and_that_of_loftq_is_not(make: Callable[..., Any]) -> None:
    first = {
        init: record_of(make(init, lora={"init": init}, train={"steps": 1})).evals[0].eval_loss
        for init in ("default", *INITS)
    }
    assert first["eva"] == first["default"] != first["loftq"]


@pytest.mark.parametrize("init", INITS)
def test_a_resumed_run_does_not_compute_its_start_again(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str
) -> None:
    lora = {"init": init}
    trained(make("whole", lora=lora))
    trained(make("cut", lora=lora), until=6)

    def refuse(*_: Any, **__: Any) -> Any:
        raise RecipeError("computed again")

    monkeypatch.setattr(adapter_start, f"{init}_start", refuse)
    trained(make("cut", lora=lora))
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    with pytest.raises(RecipeError, match="computed again"):  # the test sees it where it is computed
        trained(make("other", lora=lora))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.usefixtures("clean_dynamo")
def test_both_sides_of_a_bench_begin_with_one_adapter(make_recipe: Any, tmp_path: Path, init: str) -> None:
    def with_init(init: str) -> Request:
        model, data, compile = {"dtype": "float32"}, {"validation": 0}, {"scope": "regions", "regions": ["loss"]}
        rest = {"train": {"steps": 1}, "proof": {"bench": 1}, "lora": {"init": init}}
        return request_for(make_recipe(model=model, data=data, compile=compile, **rest))  # type: ignore[no-any-return]

    request = with_init(init)
    *_, ours = side.ours(request, start=tmp_path / "start")
    *_, naive = side.naive(request, start=tmp_path / "start")
    assert naive.losses == pytest.approx(ours.side.losses, rel=1e-5) and len(naive.losses) == 2 + WARM_UP_STEPS
    *_, other = side.naive(with_init("default"))
    assert naive.losses != pytest.approx(other.losses, rel=1e-5)
    with pytest.raises(AssertionError, match="both sides begin with one adapter"):
        list(side.naive(request))
