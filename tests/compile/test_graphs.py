"""compile.cuda_graphs without a CUDA device; tests/gpu has the rest."""

import pytest
import torch

from launcher.compile.graphs import check_graphs, outcome
from launcher.errors import ContractError, RecipeError
from launcher.recipe.load import resolve
from launcher.recipe.schema import CompileSection
from launcher.train import setup
from launcher.train.history import RunHistory
from launcher.train.loop import training
from tests.conftest import request_for
from tests.support.workers import compiled

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(("given", "kept"), [("on", "on"), ("off", "off"), ("false", "off"), ("auto", "auto")])
def test_the_choice_reads_bare_words_as_yaml_does(given, kept):
    assert resolve(["recipe=tiny", f"compile.cuda_graphs={given}"]).recipe.compile.cuda_graphs == kept


def test_graphs_are_refused_on_a_cpu_before_any_weight_is_read(make_recipe, monkeypatch):
    monkeypatch.setattr(setup, "build_model", lambda *_, **__: pytest.fail("the model was built"))
    with pytest.raises(RecipeError, match="compile.cuda_graphs=on needs a CUDA device") as caught:
        list(training(request_for(make_recipe(compile={"cuda_graphs": "on"})), RunHistory()))
    assert caught.value.code == 2
    check_graphs(CompileSection(cuda_graphs="on"), CUDA)
    check_graphs(CompileSection(cuda_graphs="auto"), CPU)


@pytest.mark.usefixtures("clean_dynamo")
@pytest.mark.parametrize(("asked", "said"), [("auto", "off (the device is CPU)"), ("off", "off (as asked)")])
def test_the_start_record_says_why_nothing_is_captured(make_recipe, asked, said):
    worker = compiled(make_recipe(compile={"cuda_graphs": asked, "mode": "off"}))
    assert worker.cuda_graphs == said
    assert [phase.phase for phase in worker.ledger.phases][-1] == "after compile"


def test_a_failed_capture_is_reported_or_ends_the_run_as_the_recipe_asks():
    assert outcome([None, None], wanted="on") == "on"
    assert outcome(["it waits"], wanted="auto") == "off (capture failed: it waits)"
    assert "on 1 of 2 ranks, rank 1: it waits" in outcome([None, "it waits"], wanted="auto")
    with pytest.raises(ContractError, match="must be captured; it failed: it waits") as caught:
        outcome(["it waits"], wanted="on")
    assert caught.value.code == 9
