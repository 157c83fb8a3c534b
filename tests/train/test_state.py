"""A run that goes on from a saved state is, bit for bit, the run that was never interrupted."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from launcher.data import stream
from launcher.errors import CheckpointError
from launcher.train import loss_scale
from launcher.train import state as state_module
from launcher.train.setup import Worker
from launcher.train.state import EarlyStop, TrainState
from tests.support.states import flat, leaves, through_files, train
from tests.support.workers import compiled

pytestmark = pytest.mark.usefixtures("clean_dynamo")

MakeRecipe = Callable[..., Any]
OFF = {"mode": "off"}


def resumed(recipe: Any, state: dict[str, Any]) -> Worker:
    """A fresh worker of the recipe that has loaded `state`, which files hold as it is."""
    worker, from_files = compiled(recipe), through_files(state)
    assert flat(from_files) == flat(state)
    worker.state.load_state_dict(from_files)
    return worker


def assert_goes_on_alike(recipe: Any, *, steps: int = 3) -> dict[str, Any]:
    """Train twice as many steps at once, and with an interruption in the middle; returns the state in the middle."""
    whole = compiled(recipe)
    before = train(whole, steps)
    middle = whole.state.state_dict()
    after = train(whole, steps)
    end = flat(whole.state.state_dict())  # before the generators are set back
    whole.plan.release()
    again = resumed(recipe, middle)
    assert again.state.step == steps
    assert train(again, steps) == after
    assert flat(again.state.state_dict()) == end
    again.plan.release()
    assert before != after
    assert flat(middle) != end
    return middle


@pytest.mark.parametrize(
    ("data", "mode"), [("weighted", "off"), ("bucketed", "off"), ("padded", "off"), ("streamed", "strict")]
)
def test_a_resumed_run_is_bit_equal_to_the_uninterrupted_one(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, rows_file: Any, data: str, mode: str
) -> None:
    monkeypatch.setattr(stream, "WINDOW_BLOCKS", 4)  # so that a step or two use a window up
    section = {
        "weighted": {"sources": [{"path": str(rows_file), "weight": weight} for weight in (1, 3)]},
        "bucketed": {"batching": "bucketed"},
        "padded": {"batching": "padded"},
        "streamed": {"streaming": True, "validation": 0},
    }[data]
    recipe = make_recipe(data=section, compile={"mode": mode}, lora={"dropout": 0.2}, train={"steps": 6})
    middle = assert_goes_on_alike(recipe)
    assert middle["loader"] != {"epoch": 0, "offset": 0}


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        *((optimizer, dtype) for optimizer in ("adamw", "adamw_8bit") for dtype in ("float32", "bfloat16", "float16")),
        ("adafactor", "float32"),
        ("lion", "float16"),
        ("lion_8bit", "float32"),
        ("muon", "float16"),
        ("schedule_free_adamw", "float16"),
    ],
)
def test_every_optimizer_and_dtype_goes_on_bit_equal(make_recipe: MakeRecipe, optimizer: str, dtype: str) -> None:
    sections = {"model": {"dtype": dtype}, "compile": OFF, "lora": {"r": 64}}
    keys = {"steps": 8, "optimizer": optimizer, "schedule": "constant", "warmup": 2}
    middle = assert_goes_on_alike(make_recipe(**sections, train=keys), steps=4)
    kinds = {tensor.dtype for name, tensor in flat_tensors(middle) if name.startswith("training.optimizer")}
    assert (torch.uint8 in kinds) == optimizer.endswith("8bit")


def flat_tensors(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in leaves(state) if isinstance(value, Tensor))


def test_the_loss_scale_its_good_steps_and_the_updates_done_are_kept(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 4)
    recipe = make_recipe(model={"dtype": "float16"}, compile=OFF, train={"steps": 6, "warmup": 2})
    worker = compiled(recipe)
    worker.step.scaler.update(2.0**40)  # overflows: halved, and the schedule is held
    train(worker, 3)
    again = resumed(recipe, worker.state.state_dict())
    assert again.step.scaler.get_scale() == worker.step.scaler.get_scale() == 2.0**37
    worker.step.scaler.update(1.0)
    [first, second] = train(worker, 2)
    assert first[2] == 0 < second[2]  # only now is the first update made, at the warm-up's first rate
    again.state.load_state_dict(through_files(worker.state.state_dict()))
    train(again, 1)
    assert again.step.scaler.get_scale() == 1
    train(again, 1)
    assert again.step.scaler.get_scale() == 2  # after four good steps, two of them before the interruption


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor", "muon", "schedule_free_adamw"])
def test_a_state_of_before_the_first_step_is_the_beginning(make_recipe: MakeRecipe, optimizer: str) -> None:
    recipe = make_recipe(compile=OFF, train={"optimizer": optimizer, "schedule": "constant"})
    expected = train(compiled(recipe), 3)
    worker = compiled(recipe)
    beginning = worker.state.state_dict()
    assert train(worker, 3) == expected
    worker.state.load_state_dict(through_files(beginning))
    assert train(worker, 3) == expected


def test_a_run_that_met_a_nan_stays_stopped_after_a_resume(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(compile=OFF)
    worker = compiled(recipe)
    train(worker, 1)
    with torch.no_grad():
        worker.step.parameters[1].view(-1)[0] = float("nan")
    train(worker, 1)
    broken = worker.state.state_dict()
    with torch.no_grad():
        worker.step.parameters[1].view(-1)[0] = 0.0
    again = resumed(
        recipe, {**broken, "training": {**broken["training"], "adapters": worker.step.live_state()["adapters"]}}
    )
    assert bool(again.step(next(again.batches)).grad_norm.isnan())
    assert not bool(compiled(recipe).step.live_state()["non_finite"])


def test_a_state_is_a_copy_and_loading_writes_where_captured_graphs_read(make_recipe: MakeRecipe) -> None:
    worker = compiled(make_recipe(compile=OFF))
    train(worker, 1)
    state = worker.state.state_dict()
    held = flat(state)
    places = [tensor.data_ptr() for _, tensor in flat_tensors(worker.step.live_state())]
    train(worker, 1)
    assert flat(state) == held
    worker.state.load_state_dict(state)
    assert [tensor.data_ptr() for _, tensor in flat_tensors(worker.step.live_state())] == places
    assert flat(worker.state.state_dict()) == held
    train(worker, 1)
    assert flat(state) == held
    targets = state["identity"]["lora.targets"]
    expected = [*targets]
    targets.append("other")
    assert worker.state.state_dict()["identity"]["lora.targets"] == expected


def test_the_random_numbers_of_every_library_go_on(make_recipe: MakeRecipe) -> None:
    def drawn() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.normal(), np.random.random(), float(torch.rand(()))]

    worker = compiled(make_recipe(compile=OFF))
    drawn()  # Python's and numpy's normal numbers are made in pairs: the second one waits
    state = through_files(worker.state.state_dict())
    expected = drawn()
    assert drawn() != expected
    worker.state.load_state_dict(state)
    assert drawn() == expected


def test_each_rank_finds_its_own_random_numbers(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = compiled(make_recipe(compile=OFF))
    torch.manual_seed(7)
    other = state_module.random_state(torch.device("cpu"))
    expected = float(torch.rand(()))
    monkeypatch.setattr(state_module, "gather", lambda own: [other, own])
    state = worker.state.state_dict()
    assert list(state["random"]) == ["0", "1"]
    worker.state.load_state_dict(state)
    assert float(torch.rand(())) == expected


def test_a_rank_that_the_state_does_not_know_is_seeded_by_its_number(make_recipe: MakeRecipe) -> None:
    worker, drawn = compiled(make_recipe(compile=OFF)), list[float]()
    state = through_files(worker.state.state_dict())
    for rank in (1, 2, 1):
        more = {**state["identity"], "processes": 3}
        new = TrainState(worker.step, worker.batches, identity=more, rank=rank, allow_reshard=True)
        torch.manual_seed(7)
        new.load_state_dict(state)
        drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[2] != drawn[1]


def test_what_decides_no_number_may_differ(make_recipe: MakeRecipe) -> None:
    state = compiled(make_recipe(compile=OFF)).state.state_dict()
    changes = {
        "train": {"steps": 5, "log_every": 3, "eval_every": 2},
        "memory": {"loss_chunk_mib": 64},
        "run": {"sample_tokens": 0},
    }
    other = compiled(make_recipe(compile={"backend": "aot_eager"}, **changes))
    other.state.load_state_dict(state)
    other.plan.release()


def broken_states(state: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What no run has saved, each with what the refusal must name."""
    training, adapters, early_stop = state["training"], state["training"]["adapters"], state["early_stop"]
    first, *others = adapters
    shorter = {**adapters, first: adapters[first][:-1]}
    renamed = {**{name: adapters[name] for name in others}, "other": adapters[first]}
    yield (
        f"training.adapters.{first}: float32 .3, 64. in the state, float32 .4, 64. here",
        {**state, "training": {**training, "adapters": shorter}},
    )
    yield f"training.adapters.{first}: missing", {**state, "training": {**training, "adapters": renamed}}
    yield "training: missing", {key: value for key, value in state.items() if key != "training"}
    yield "random: missing", {**state, "random": {"1": state["random"]["0"]}}
    yield "train.lr: 1.0 in the state, 0.001 here", {**state, "identity": {**state["identity"], "train.lr": 1.0}}
    yield "processes: missing", {**state, "identity": {**state["identity"], "processes": None}}
    yield "step: missing", {key: value for key, value in state.items() if key != "step"}
    yield "early_stop: missing", {key: value for key, value in state.items() if key != "early_stop"}
    yield "early_stop.patience: int in the state, missing here", {**state, "early_stop": {**early_stop, "patience": 1}}
    yield "early_stop.best_eval_loss: str in the state", {**state, "early_stop": {**early_stop, "best_eval_loss": "2"}}
    yield "early_stop.evals_since_best: missing", {**state, "early_stop": {"best_eval_loss": 2.0}}
    yield "a loader state must", {**state, "loader": {"epoch": 0, "offset": 10**6}}


def test_a_state_that_is_refused_changes_nothing(make_recipe: MakeRecipe) -> None:
    worker = compiled(make_recipe(compile=OFF))
    train(worker, 2)
    good = worker.state.state_dict()
    train(worker, 1)
    before = flat(worker.state.state_dict())
    for named, state in broken_states(good):
        with pytest.raises(CheckpointError, match=named):
            worker.state.load_state_dict(state)
        assert flat(worker.state.state_dict()) == before
    worker.state.load_state_dict(good)
    assert flat(worker.state.state_dict()) == flat(good)


def test_the_best_eval_loss_and_the_evaluations_since_are_remembered(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(compile=OFF)
    state = compiled(recipe).state
    for loss in (3.0, 2.0, 2.5, 2.0):
        state.early_stop.update(loss)
    early_stop = resumed(recipe, state.state_dict()).state.early_stop
    assert early_stop == EarlyStop(best_eval_loss=2.0, evals_since_best=2)
    early_stop.update(1.0)
    assert early_stop == EarlyStop(best_eval_loss=1.0, evals_since_best=0)
