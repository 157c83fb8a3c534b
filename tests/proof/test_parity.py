"""Three models, the same batches: alike in every scope, batching and dtype, one after the other in memory."""

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo

from launcher.data.pack.micro_batch import IGNORE
from launcher.proof import parity as measure
from launcher.proof.parity import parity
from launcher.proof.stock import grouped, supervised_documents
from launcher.records.parity import ParityRecord
from launcher.train import setup
from tests.conftest import request_for

pytestmark = pytest.mark.usefixtures("clean_dynamo")
BATCHES = 2


def compared(recipe: Any) -> ParityRecord:
    [record] = [event for event in parity(request_for(recipe)) if not isinstance(event, str)]
    return record


def small(make_recipe: Callable[..., Any], **sections: dict[str, Any]) -> Any:
    return make_recipe(
        **{
            "data": {"validation": 0, "max_length": 128},
            "train": {"steps": 1, "micro_batch": 1},
            "proof": {"parity": BATCHES},
        }
        | sections
    )


@pytest.mark.parametrize(
    ("scope", "batching", "dtype"),
    [
        ("layer", "packed", "bfloat16"),
        ("regions", "bucketed", "float32"),
        ("model", "padded", "bfloat16"),
    ],
)
def test_the_compiled_path_is_within_the_gate_in_every_scope_and_batching(
    make_recipe: Callable[..., Any], scope: str, batching: str, dtype: str
) -> None:
    data = {"batching": batching, "validation": 0, "max_length": 128 if batching == "packed" else 32}
    record = compared(small(make_recipe, data=data, model=model_of(make_recipe, dtype), compile=aot(scope=scope)))
    assert record.holds, record.verdicts
    assert len(record.verdicts) == 4 and len(record.batches) == BATCHES
    assert record.compile.planned_graphs == record.compile.expected_graphs > 0
    assert len(record.adapters) == 14
    assert all(0 < batch.reference_loss < 100 and batch.supervised_tokens > 5 for batch in record.batches)
    if dtype == "bfloat16":  # the figures are measured, not copied
        assert 1e-4 < record.gradient_error.compiled < 0.2
        assert 1e-4 < record.gradient_error.eager < 0.2


def model_of(make_recipe: Callable[..., Any], dtype: str) -> dict[str, Any]:
    return {"name": make_recipe().model.name, "dtype": dtype}


def aot(**changes: Any) -> dict[str, Any]:
    return {"backend": "aot_eager", **changes}


def test_random_weights_are_the_same_in_all_three_and_accumulated_batches_are_compared_whole(
    make_recipe: Callable[..., Any],
) -> None:
    model = model_of(make_recipe, "float32") | {"init": "random"}
    train = {"accumulation": 2, "steps": 1, "micro_batch": 1}
    record = compared(small(make_recipe, model=model, train=train, lora={"r": 4, "dropout": 0.3}))
    assert record.holds, record.verdicts
    assert any("lora.dropout=0, not the recipe's 0.3" in note for note in record.notes)
    assert record.batches[0].reference_loss == pytest.approx(math.log(8192), rel=0.02)  # a guess among the vocabulary


def test_float16_is_compared_with_its_loss_scale(make_recipe: Callable[..., Any]) -> None:
    record = compared(small(make_recipe, model=model_of(make_recipe, "float16"), compile=aot(mode="off")))
    assert record.holds, record.verdicts
    assert any("compile.mode=off" in note for note in record.notes)


def test_each_model_is_freed_before_the_next_is_built(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    seen: list[int] = []

    def watched(build: Callable[..., Any]) -> Callable[..., Any]:
        def built(*arguments: Any, **options: Any) -> Any:
            gc.collect()
            seen.append(sum(ref() is not None for ref in alive))
            model = build(*arguments, **options)
            peft = getattr(model, "peft", model)
            alive.append(weakref.ref(peft.base_model.model.model.layers[0].self_attn.q_proj.weight))
            return model

        return built

    monkeypatch.setattr(setup, "build_model", watched(setup.build_model))
    monkeypatch.setattr(measure, "stock_model", watched(measure.stock_model))
    compared(small(make_recipe, proof={"parity": 1}, compile=aot(scope="regions", regions=["loss"])))
    assert seen == [0, 0, 0]


def test_documents_are_cut_out_of_their_rows_and_grouped_within_the_room_there_is() -> None:
    ids = torch.arange(20).reshape(2, 10)
    labels = torch.full((2, 10), IGNORE)
    numbers = torch.tensor([[0] * 4 + [1] * 3 + [2] * 3, [0] * 10])
    labels[0, 0], labels[0, 5], labels[1, 3] = 1, 6, 14
    documents = supervised_documents(ids, labels, numbers)
    assert [d.tolist() for d, _ in documents] == [[0, 1, 2, 3], [4, 5, 6], list(range(10, 20))]
    assert [targets.tolist() for _, targets in documents][1] == [IGNORE, 6, IGNORE]
    assert [[len(d) for d, _ in group] for group in grouped(documents, positions=10)] == [[10], [4, 3]]
    assert [[len(d) for d, _ in group] for group in grouped(documents, positions=3)] == [[10], [4], [3]]
