"""lora.init=eva: A spans the directions in which the inputs vary most, by plain code and by PEFT's own."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor

from launcher.data.documents import Documents
from launcher.errors import RecipeError
from launcher.model import eva
from launcher.model.build import build_base
from launcher.model.lora import ADAPTER
from launcher.proof.stock import supervised_documents
from launcher.train import adapter_start
from launcher.train.setup import Worker
from launcher.train.step import arguments
from tests.support.workers import built

CPU = torch.device("cpu")
Begun = Callable[..., Worker]


@pytest.fixture
def begun(make: Callable[..., Any]) -> Begun:
    """A worker at its start, by these keys of the section lora; `data`: on these documents, not on the recipe's."""
    return lambda data=None, **lora: built(make(lora={"init": "eva", "r": 4, **lora}), data)


def stock_base(worker: Worker) -> Any:
    recipe = worker.recipe
    return build_base(recipe, recipe.model.name, worker.prepared.config, dtype=torch.float32, device=CPU).model.train()


def all_documents(worker: Worker) -> list[tuple[Tensor, Tensor]]:
    """Token ids and shifted labels of what EVA_TARGETS has room for here: an epoch."""
    loader = adapter_start._first_batches(worker.prepared.data, micro_batch=2, seed=0)
    return [document for micro in loader for document in supervised_documents(micro)]


def plain_inputs(worker: Worker, documents: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The inputs of every linear at the supervised positions, each document alone in stock code."""
    model, rows, mask = stock_base(worker), defaultdict(list), torch.zeros(0)

    def collect(name: str) -> Any:
        return lambda _, given: rows[name].append(given[0][0][mask])

    for name, module in model.model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(collect(f"model.{name}"))
    for ids, labels in documents:
        mask = labels != -100
        with torch.no_grad():
            model(input_ids=ids[None])
    return {name: torch.cat(parts) for name, parts in rows.items()}


def adapters(worker: Worker) -> dict[str, Any]:
    modules = worker.built.peft.get_base_model().named_modules()
    return {name: module for name, module in modules if hasattr(module, "lora_A")}


def spans(a: Tensor, b: Tensor) -> float:
    """The least cosine between the spaces of two sets of orthonormal rows, [r, D]."""
    return float(torch.linalg.svdvals(a @ b.T).min())


def directions(inputs: Tensor, rank: int, *, centred: bool = True) -> Tensor:
    x = inputs.double() - inputs.double().mean(0) * centred
    return torch.linalg.svd(x, full_matrices=False)[2][:rank].float()


def test_a_spans_what_a_full_decomposition_of_the_inputs_gives(begun: Begun) -> None:
    worker = begun(rank_pattern={"v_proj": 7}, dropout=0.5)
    inputs = plain_inputs(worker, all_documents(worker))
    assert len(inputs) == 14 and {len(rows) for rows in inputs.values()} == {len(inputs["model.layers.0.mlp.up_proj"])}
    uncentred = []
    for name, module in adapters(worker).items():
        a, b = module.lora_A[ADAPTER].weight.detach(), module.lora_B[ADAPTER].weight
        assert len(a) == (7 if "v_proj" in name else 4) and not b.any()
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=1e-4)
        assert spans(a, directions(inputs[name], len(a))) > 1 - 1e-5, name
        uncentred.append(spans(a, directions(inputs[name], len(a), centred=False)))
    assert min(uncentred) < 0.9  # the comparison sees what is not centred
    tokens = len(inputs["model.layers.0.mlp.up_proj"])
    assert any(f"the inputs at {tokens:,} supervised tokens of the first" in note for note in worker.built.notes)


def test_linears_of_one_input_begin_alike_and_a_grouped_module_as_one_that_is_not(begun: Begun) -> None:
    a = {name: module.lora_A[ADAPTER].weight.detach() for name, module in adapters(begun()).items()}
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    assert torch.equal(a[attention + "q_proj"], a[attention + "k_proj"])
    assert torch.equal(a[mlp + "gate_proj"], a[mlp + "up_proj"])
    assert spans(a[attention + "q_proj"], a[mlp + "up_proj"]) < 0.9
    alone = adapters(begun(dropout=0.5))  # projections are grouped only without dropout
    for name, module in alone.items():
        torch.testing.assert_close(module.lora_A[ADAPTER].weight.detach(), a[name], rtol=0, atol=1e-4, msg=name)


def test_a_takes_as_much_of_the_inputs_as_what_pefts_own_code_finds(begun: Begun) -> None:
    worker = begun()
    ids, labels = max(all_documents(worker), key=lambda document: int((document[1] != -100).sum()))
    config = LoraConfig(
        r=4, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"], init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0), task_type="CAUSAL_LM",
    )  # fmt: skip
    batch = {"input_ids": ids[None], "labels": labels[None]}  # labels choose the positions, no more
    theirs = get_eva_state_dict(get_peft_model(stock_base(worker), config), [batch], show_progress_bar=False)
    places, ends = torch.arange(len(ids))[None], torch.tensor([0, len(ids)], dtype=torch.int32)
    one = (ids[None], labels[None], places, torch.zeros_like(places, dtype=torch.int32), ends)
    drawn = {name: module.lora_A[ADAPTER].weight.detach().clone() for name, module in adapters(worker).items()}
    assert eva.eva_start(worker.built.packed, [one], targets=8192, seed=0) == int((labels != -100).sum()) > 8
    inputs = plain_inputs(worker, [(ids, labels)])
    found = {name.removeprefix("base_model.model."): a.float() for name, a in theirs.items()}
    assert len(found) == 8
    for name, a in found.items():
        torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-3)  # not whitened by default
        x, ours = inputs[name] - inputs[name].mean(0), adapters(worker)[name].lora_A[ADAPTER].weight.detach()
        share = float((x @ a.T).square().sum() / (x @ ours.T).square().sum())
        assert 0.97 < share < 1 + 1e-5, name  # PEFT iterates twice, and its model in eval mode may compute in bf16
        assert (x @ torch.linalg.qr(drawn[name].T)[0]).square().sum() < 0.9 * (x @ ours.T).square().sum()


def test_no_more_tokens_are_taken_than_the_bounds_say(begun: Begun, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = begun()
    batches = [arguments(m) for m in adapter_start._first_batches(worker.prepared.data, micro_batch=2, seed=0)]
    assert len(batches) == worker.batches.steps_per_epoch > 2
    assert eva.eva_start(worker.built.packed, batches, targets=9, seed=0) == 9
    for bound in ("EVA_TARGETS", "EVA_POSITIONS"):
        with monkeypatch.context() as patch:
            patch.setattr(adapter_start, bound, 1)
            [first] = adapter_start._first_batches(worker.prepared.data, micro_batch=2, seed=0)
            assert torch.equal(first.input_ids, batches[0][0])
    assert torch.equal(first.input_ids, next(worker.batches).micro_batches[0].input_ids)  # the run's own first


def test_a_rank_beyond_the_directions_of_the_inputs_is_refused(begun: Begun) -> None:
    with pytest.raises(RecipeError, match=r"layers.0.self_attn.q_proj vary in 64 over .* rank is 65.\nLower lora.r"):
        begun(r=65)
    few = Documents(np.tile([5, 9, 7], 300).astype(np.int32), np.ones(900, np.bool_), np.arange(0, 903, 3))
    with pytest.raises(RecipeError, match=r"vary in 1 over [\d,]+ supervised tokens"):
        begun(few)  # two tokens have targets: about their mean they differ in one direction
