"""Trained tokens have the loss and the gradients of stock PEFT's, in one graph; a row that is left out is seen."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from launcher.model.trained_tokens import TrainedTokens
from launcher.ops import linear_ce
from launcher.proof.parity import trainable
from launcher.proof.start import start_verdict
from launcher.proof.stock import packed_arguments
from launcher.recipe.schema import Recipe
from launcher.train.optim import parameter_groups
from tests.support.family_figures import RECIPE, build, compiled, config_of, differences, reloaded, stock_of, token_ids
from tests.support.models import packed_batch

OCCURRING, ABSENT = packed_batch(251)[0][0, [1, 7]].tolist(), 250


def with_tokens(*ids: int, **lora: Any) -> Recipe:
    values = RECIPE.model_dump()
    values["lora"] |= {"trainable_tokens": list(map(str, ids)), **lora}
    return Recipe.model_validate(values)


TOKENS = with_tokens(*sorted([*OCCURRING, ABSENT]))


def rows_of(gradients: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in gradients.items() if "trainable_tokens_delta" in name}


@pytest.mark.parametrize(
    ("model_type", "tied", "init"),
    [
        ("llama", True, "default"),
        ("llama", False, "default"),
        ("gemma2", True, "default"),
        ("gemma3_text", False, "default"),
        ("granite", True, "default"),
        ("llama", True, "pissa"),
        ("llama", False, "olora"),
    ],
)
def test_loss_and_gradients_are_those_of_stock_peft(model_type: str, tied: bool, init: str) -> None:
    recipe = with_tokens(*map(int, TOKENS.lora.trainable_tokens), init=init)
    loss, gradients = differences(config_of(model_type, tie_word_embeddings=tied), recipe)
    assert loss < 1e-5 and max(gradients.values()) < 1e-4, gradients
    assert len(rows_of(gradients)) == (1 if tied else 2)


@pytest.mark.parametrize("tied", [True, False])
def test_the_saved_adapter_has_the_same_loss_in_stock_peft(tied: bool) -> None:
    assert reloaded(config_of("llama", tie_word_embeddings=tied), TOKENS) < 1e-5


@pytest.mark.usefixtures("clean_dynamo")
def test_trained_tokens_need_no_graph_more_and_nothing_breaks_or_recompiles() -> None:
    record = compiled(config_of("gemma2"), recipe=TOKENS)[1].record()
    assert record.graphs_by_region == {"layer": 2, "loss": 2}
    assert (record.graph_breaks, record.recompiles) == (0, 0)
    assert record.compilations == record.planned_graphs == record.expected_graphs


@pytest.mark.parametrize("trains_the_token", [False, True])
def test_a_token_whose_vector_is_the_mean_is_learned_with_its_row_and_never_without(trains_the_token: bool) -> None:
    """Its logit is the mean of all: logsumexp is at least that and ln(V), whatever the adapters do."""
    end = ABSENT
    built, _ = build(config_of("llama", tie_word_embeddings=True), with_tokens(end) if trains_the_token else RECIPE)
    packed, parameters = built.packed, [parameter for _, parameter in trainable(built.peft)]
    others = torch.arange(251) != end
    with torch.no_grad():
        packed.embed.weight[end] = packed.embed.weight[others].mean(0)
        if packed.trained is not None:
            packed.trained.embedding_rows.copy_(packed.embed.weight[[end]])
    ids, labels, *rest = packed_arguments([torch.tensor([5, end, 9, end, 7, end])])
    labels[labels != end] = -100
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(25):
        loss = packed(ids, labels, *rest) / 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1 if trains_the_token else loss > math.log(251) - 1e-3


def left_out_of_the_head(patch: pytest.MonkeyPatch) -> None:
    right = linear_ce.trained_gradient
    keep = torch.tensor([[0.0], [1.0], [1.0]])
    patch.setattr(linear_ce, "trained_gradient", lambda *inputs: right(*inputs) * keep)


def written_to_the_wrong_rows(patch: pytest.MonkeyPatch) -> None:
    def write(self: Any) -> None:
        with torch.no_grad():
            self._weights[0].index_copy_(0, self.ids.roll(1), self.embedding_rows)

    patch.setattr(TrainedTokens, "write", write)


def not_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TrainedTokens, "write", lambda self: None)


def taken_for_one_another(patch: pytest.MonkeyPatch) -> None:
    right = TrainedTokens.reached_by

    def reached_by(self: Any, embedded: Tensor, input_ids: Tensor) -> Tensor:
        first, second = (input_ids == self.ids[number] for number in (0, 1))
        return right(self, embedded, input_ids.where(~first, self.ids[1]).where(~second, self.ids[0]))

    patch.setattr(TrainedTokens, "reached_by", reached_by)


@pytest.mark.parametrize("plant", [left_out_of_the_head, written_to_the_wrong_rows, not_written, taken_for_one_another])
def test_a_row_that_is_left_out_or_mistaken_is_seen(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    loss, gradients = differences(config_of("llama", tie_word_embeddings=True), TOKENS)
    assert max(rows_of(gradients).values()) > 0.01
    assert (loss > 1e-5) == (plant in (not_written, written_to_the_wrong_rows))


def test_the_row_of_the_models_own_pad_token_gets_no_gradient_from_the_embedding_as_in_torch() -> None:
    """config_of's pad id is 0, and its embedding has a padding_idx."""
    config, recipe = config_of("llama", tie_word_embeddings=False), with_tokens(0, 5)
    built, adapters = build(config, recipe)
    assert built.packed.embed.padding_idx == 0
    piece = torch.tensor([5, 0, 7, 5, 0, 9])
    built.packed(*packed_arguments([piece])).backward()
    stock = stock_of(config, adapters, recipe)
    stock(input_ids=piece[None], labels=piece[None]).loss.backward()
    for model in (built.peft, stock):
        by_module = {name.split(".token_adapter")[0]: p.grad for name, p in rows_of(dict(trainable(model))).items()}
        head, embedding = by_module["base_model.model.lm_head"], by_module["base_model.model.model.embed_tokens"]
        assert not embedding[0].any() and embedding[1].any() and head.any(1).all()


def test_a_token_that_does_not_occur_has_a_gradient_by_the_head_alone() -> None:
    built, _ = build(config_of("llama", tie_word_embeddings=False), with_tokens(ABSENT))
    batch = packed_batch(250)  # without it
    built.packed(*batch).backward()
    assert built.packed.trained is not None
    assert not built.packed.trained.embedding_rows.grad.any() and built.packed.trained.head_rows.grad.any()


def test_rows_follow_the_parameters_into_evaluation_and_out_of_the_base_again() -> None:
    built, _ = build(config_of("llama", tie_word_embeddings=True), TOKENS)
    packed, batch = built.packed, packed_batch(251)
    assert packed.trained is not None and packed.head.weight is packed.embed.weight
    before = packed.embed.weight.clone()
    with torch.no_grad():
        first = packed(*batch)
        packed.trained.embedding_rows.add_(0.5)
        assert packed(*batch) != first
        packed.trained.embedding_rows.sub_(0.5)
        torch.testing.assert_close(packed(*batch), first)
    others = torch.ones(251, dtype=torch.bool)
    others[list(token_ids(TOKENS))] = False
    assert torch.equal(packed.embed.weight[others], before[others])


def test_the_start_is_compared_with_stock_code_rows_included_and_all_is_as_before() -> None:
    built, adapters = build(config_of("gemma3_text", tie_word_embeddings=True), TOKENS)
    pieces = [torch.tensor([5, *OCCURRING, 9, 3, 8, 1, 2]), torch.tensor([OCCURRING[0]] * 9)]
    verdict = start_verdict(built, pieces, seed=0)
    assert verdict.holds, verdict.evidence
    assert all(torch.equal(parameter, adapters[name]) for name, parameter in trainable(built.peft))
    right = TrainedTokens.reached_by
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainedTokens, "reached_by", lambda self, embedded, ids: right(self, embedded, ids * 0))
        wrong = start_verdict(built, pieces, seed=0)
    assert not wrong.holds and "embedding rows" in wrong.evidence


def test_rows_have_no_weight_decay_and_the_rate_of_a() -> None:
    recipe = with_tokens(3, 5, plus_ratio=16.0)
    train = recipe.train.model_copy(update={"weight_decay": 0.1})
    built, adapters = build(config_of("llama", tie_word_embeddings=False), recipe)
    groups = parameter_groups(list(trainable(built.packed)), train, lr=1.0)
    assert built.packed.trained is not None
    for rows in (built.packed.trained.embedding_rows, built.packed.trained.head_rows):
        [group] = [group for group in groups if any(one is rows for one in group["params"])]
        assert (group["weight_decay"], group["rate_factor"]) == (0.0, 1.0)
    others = {(group["weight_decay"], group["rate_factor"]) for group in groups if group["weight_decay"]}
    assert others == {(0.1, 1.0), (0.1, 16.0)}
    stock = trainable(stock_of(config_of("llama", tie_word_embeddings=False), adapters, recipe))  # of mode=bench
    theirs = parameter_groups(stock, train, lr=1.0)
    sizes = [sorted((len(g["params"]), g["weight_decay"]) for g in side) for side in (groups, theirs)]
    assert sizes[0] == sizes[1]
