"""mode=parity: the three models agree in every scope, batching and dtype, and only one is in memory at a time."""

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from launcher.ops import linear_ce, qlora_linear
from launcher.proof import parity as parity_module
from launcher.proof.parity import parity
from launcher.records.parity import ParityRecord
from launcher.train import setup
from tests.conftest import request_for

pytestmark = pytest.mark.usefixtures("clean_dynamo")
BATCHES = 2


@pytest.fixture
def compared(make_recipe: Callable[..., Any]) -> Callable[..., ParityRecord]:
    """The record of a small recipe with these sections."""

    def run(**sections: dict[str, Any]) -> ParityRecord:
        sections["data"] = {"validation": 0, "max_length": 128} | sections.get("data", {})
        sections["train"] = {"steps": 1, "micro_batch": 1} | sections.get("train", {})
        sections.setdefault("proof", {"parity": BATCHES})
        *_, record = parity(request_for(make_recipe(**sections)))
        assert isinstance(record, ParityRecord)
        return record

    return run


@pytest.mark.parametrize(
    ("scope", "batching", "dtype"),
    [("layer", "packed", "bfloat16"), ("regions", "bucketed", "float32"), ("model", "padded", "bfloat16")],
)
def test_the_compiled_path_is_within_the_gate_in_every_scope_and_batching(
    compared: Callable[..., ParityRecord], scope: str, batching: str, dtype: str
) -> None:
    data = {"batching": batching, "max_length": 128 if batching == "packed" else 32, "too_long": "split"}
    record = compared(data=data, model={"dtype": dtype}, compile={"scope": scope})
    assert record.holds, record.verdicts
    assert len(record.batches) == BATCHES and len(record.adapters) == 14
    assert [record.verdicts[i].claim for i in (0, -1)] == ["base loaded whole", "every step ran compiled"]
    assert record.compile.planned_graphs == record.compile.expected_graphs > 0
    assert all(0 < batch.reference_loss < 100 and batch.supervised_tokens > 5 for batch in record.batches)
    if dtype == "bfloat16":  # the figures are measured, not copied
        assert 1e-4 < record.gradient_error.compiled < 0.2
        assert 1e-4 < record.gradient_error.eager < 0.2


def test_random_weights_are_the_same_in_all_three_and_accumulated_batches_are_compared_whole(
    compared: Callable[..., ParityRecord],
) -> None:
    model = {"dtype": "float32", "init": "random"}
    record = compared(model=model, train={"accumulation": 2}, lora={"dropout": 0.3})
    assert record.holds, record.verdicts
    assert any("lora.dropout=0, not the recipe's 0.3" in note for note in record.notes)
    assert record.batches[0].reference_loss == pytest.approx(math.log(8192), rel=0.02)  # a guess among the vocabulary


@pytest.mark.parametrize("lora", [{"dora": True, "rslora": True, "layers": ["1"]}, {"init": "pissa"}])
def test_a_variant_of_lora_is_within_the_gate_and_noise_is_left_out(
    compared: Callable[..., ParityRecord], lora: dict[str, Any]
) -> None:
    record = compared(lora=lora, model={"dtype": "bfloat16"}, train={"neftune_alpha": 5.0})
    assert record.holds, record.verdicts
    assert any("train.neftune_alpha=0, not the recipe's 5" in note for note in record.notes)


def test_a_start_that_is_not_taken_out_again_closes_the_gate(
    compared: Callable[..., ParityRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qlora_linear, "update_factors", lambda a, b, count: (a[:count], b[:count]))
    record = compared(lora={"init": "pissa"}, compile={"mode": "off"})
    assert {"compiled loss is eager's", "gradient error against fp32 is eager's"} <= {
        verdict.claim for verdict in record.verdicts if not verdict.holds
    }


TOKENS = {"trainable_tokens": ["<|user|>", "<|end|>", "<|system|>"]}  # read, written, neither


@pytest.mark.parametrize(("dtype", "scope"), [("bfloat16", "layer"), ("float16", "model")])
def test_trained_tokens_are_within_the_gate(compared: Callable[..., ParityRecord], dtype: str, scope: str) -> None:
    record = compared(lora=TOKENS, model={"dtype": dtype}, compile={"scope": scope})
    assert record.holds, record.verdicts
    rows = {adapter.kind: adapter.where for adapter in record.adapters if adapter.matrix == "rows"}
    assert {*rows} == {"embedding", "head"} and all(where.startswith("tokens, batch") for where in rows.values())


def test_a_trained_row_that_is_left_out_of_the_head_closes_the_gate(
    compared: Callable[..., ParityRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, end = linear_ce.trained_gradient, 2  # the id of <|end|>
    monkeypatch.setattr(
        linear_ce,
        "trained_gradient",
        lambda rows, scales, trained, hidden: right(rows, scales, trained, hidden) * (trained != end)[:, None],
    )
    record = compared(lora=TOKENS, model={"dtype": "float32"}, compile={"mode": "off"})
    [cosines] = [verdict for verdict in record.verdicts if verdict.claim.startswith("compiled gradients point")]
    assert not cosines.holds and "head rows" in cosines.evidence and "embedding rows" not in cosines.evidence


def test_float16_is_compared_with_its_loss_scale(compared: Callable[..., ParityRecord]) -> None:
    record = compared(model={"dtype": "float16"}, compile={"mode": "off"})
    assert record.holds, record.verdicts
    assert any("compile.mode=off" in note for note in record.notes)


def test_each_model_is_freed_before_the_next_is_built(
    compared: Callable[..., ParityRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[weakref.ref[Any]] = []
    alive: list[int] = []  # earlier models, as each is built

    def watched(build: Callable[..., Any]) -> Callable[..., Any]:
        def built(*arguments: Any, **options: Any) -> Any:
            gc.collect()
            alive.append(sum(weight() is not None for weight in weights))
            model = build(*arguments, **options)
            peft = getattr(model, "peft", model)
            weights.append(weakref.ref(peft.base_model.model.model.layers[0].self_attn.q_proj.weight))
            return model

        return built

    monkeypatch.setattr(setup, "build_model", watched(setup.build_model))
    monkeypatch.setattr(parity_module, "stock_model", watched(parity_module.stock_model))
    compared(proof={"parity": 1}, compile={"scope": "regions", "regions": ["loss"]})
    assert alive == [0, 0, 0]


@pytest.mark.parametrize("init", ["loftq", "eva"])
def test_a_start_that_is_computed_is_that_of_all_three(compared: Callable[..., ParityRecord], init: str) -> None:
    record = compared(model={"dtype": "float32"}, lora={"init": init}, compile={"mode": "off"})
    assert record.holds, record.verdicts
