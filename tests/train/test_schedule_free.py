"""Schedule-free AdamW: gradients are taken at y; what is evaluated, saved, given back and rescued is the average x."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from launcher.checkpoint.bundle import bundles_of, read_bundle
from launcher.errors import DiskError
from launcher.records.run import EvalRecord, RunRecord
from launcher.train import evaluation
from launcher.train.rescue import rescue
from launcher.train.schedule_free import averages_in_place, end_with_averages
from tests.support.planted import plant
from tests.support.runs import adapter, lines, trained
from tests.support.states import flat, train
from tests.support.workers import compiled

pytestmark = pytest.mark.usefixtures("clean_dynamo")

MakeRecipe = Callable[..., Any]
KEYS = {"optimizer": "schedule_free_adamw", "schedule": "constant", "warmup": 2, "lr": 1e-2}
BETA1 = 0.9


def weights_of(worker: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in worker.step.parameters]


def is_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def test_the_weights_inside_are_the_weighted_average_of_the_paper_and_afterwards_what_they_were(
    make_recipe: MakeRecipe,
) -> None:
    worker = compiled(make_recipe(compile={"mode": "off"}, train={**KEYS, "steps": 8}))
    optimizer, average, weights = worker.step.optimizer, weights_of(worker), 0.0
    highest = 0.0
    with averages_in_place(optimizer):
        assert is_equal(weights_of(worker), average), "before the first step x, y and z are one"
    for _ in range(6):
        [[_, _, rate, _, _]] = train(worker, 1)
        highest = max(highest, rate)
        weights += highest**2  # the paper's weight of a step, with the library's default power
        share = highest**2 / weights if weights else 0.0
        z = [optimizer.state[parameter]["z"] for parameter in worker.step.parameters]
        average = [x + share * (new - x) for x, new in zip(average, z, strict=True)]
        before = weights_of(worker)
        with averages_in_place(optimizer):
            torch.testing.assert_close(weights_of(worker), average, rtol=1e-4, atol=1e-6)
        assert is_equal(weights_of(worker), before)
    y = [(1 - BETA1) * new + BETA1 * x for new, x in zip(z, average, strict=True)]
    torch.testing.assert_close(before, y, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(torch.cat([t.view(-1) for t in before]), torch.cat([t.view(-1) for t in average]))
    optimizer.eval()
    optimizer.train()
    assert not is_equal(weights_of(worker), before), "the library's own way there and back rounds"
    end_with_averages(optimizer)
    with averages_in_place(optimizer):
        last = weights_of(worker)
    assert is_equal(weights_of(worker), last), "once training is over they stay"


def test_an_error_inside_puts_the_weights_back_too(make_recipe: MakeRecipe) -> None:
    worker = compiled(make_recipe(compile={"mode": "off"}, train={**KEYS, "steps": 8}))
    train(worker, 3)
    before = flat(worker.state.state_dict())
    with pytest.raises(ZeroDivisionError), averages_in_place(worker.step.optimizer):
        raise ZeroDivisionError
    assert flat(worker.state.state_dict()) == before


def test_evaluations_and_saves_change_no_bit_of_the_training(make: MakeRecipe, tmp_path: Path) -> None:
    trained(make("often", train={**KEYS, "eval_every": 1, "save_every": 1}))
    trained(make("never", train={**KEYS, "eval_every": 0, "save_every": 8}))
    often, never = ([line for line in lines(tmp_path / name) if "loss" in line] for name in ("often", "never"))
    assert often == never and len({line["loss"] for line in often}) == 8
    assert adapter(tmp_path / "often") == adapter(tmp_path / "never")


def test_what_is_evaluated_saved_and_in_a_checkpoint_is_the_average(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Tensor]] = []
    measure = evaluation.eval_loss_and_votes

    def spy(worker: Any) -> tuple[float, float]:
        seen.append(weights_of(worker))
        return measure(worker)

    monkeypatch.setattr(evaluation, "eval_loss_and_votes", spy)
    record = trained(make(train=KEYS))[-1]
    assert isinstance(record, RunRecord) and all(verdict.holds for verdict in record.verdicts)
    [last, *_] = bundles_of(tmp_path / "run" / "checkpoints")
    training = read_bundle(last)["state"]["training"]
    y, z = training["adapters"], {name: state["z"] for name, state in training["optimizer"].items()}
    x = [value.lerp(z[name], 1 - 1 / BETA1) for name, value in y.items()]
    assert is_equal(seen[-1], x) and not is_equal(list(y.values()), x)
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert sorted(float(t.double().sum()) for t in saved.values()) == sorted(float(t.double().sum()) for t in x)
    assert adapter(tmp_path / "run") == (last / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_best_checkpoints_average_is_given_back(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 5 on training goes up the gradient, and the average follows."""
    plant(monkeypatch, dict.fromkeys(range(5, 100), -1.0))
    events = trained(make(train={**KEYS, "eval_every": 1, "save_every": 1, "keep": 8, "keep_best": True}))
    losses = {event.step: event.eval_loss for event in events if isinstance(event, EvalRecord) and event.step}
    best = min(losses, key=lambda step: losses[step])
    assert 2 < best < 8, losses  # at the first update that has a rate x is still y
    kept = tmp_path / "run" / "checkpoints" / f"step-{best}" / "adapter" / "adapter_model.safetensors"
    assert adapter(tmp_path / "run") == kept.read_bytes()
    [verdict] = [v for v in events[-1].verdicts if v.claim == "the adapter is the best checkpoint's"]
    assert verdict.holds, verdict.evidence


def test_a_rescue_keeps_the_average_and_leaves_the_weights(make: MakeRecipe, tmp_path: Path) -> None:
    worker = compiled(make(train=KEYS))
    worker.open_folder()
    train(worker, 3)
    before, failure = weights_of(worker), DiskError("full")
    rescue(worker, failure)
    [note] = failure.__notes__
    folder = Path(note.split("was saved in ")[1].split(": copy")[0])
    saved = load_file(folder / "adapter_model.safetensors")
    assert is_equal(weights_of(worker), before)
    with averages_in_place(worker.step.optimizer):
        inside = weights_of(worker)
    sums = sorted(float(t.double().sum()) for t in saved.values())
    assert sums == sorted(float(t.double().sum()) for t in inside)
    assert sums != sorted(float(t.double().sum()) for t in before)


def test_more_steps_go_on_with_the_same_average(make: MakeRecipe, tmp_path: Path) -> None:
    """The rate is constant, so a run that is raised is the longer run from its beginning."""
    for steps in (8, 12):
        trained(make(train={**KEYS, "steps": steps}))
    trained(make("whole", train={**KEYS, "steps": 12}))
    raised, whole = ([line["loss"] for line in lines(tmp_path / f) if "loss" in line] for f in ("run", "whole"))
    assert raised == whole and len(whole) == 12 and any(a != b for a, b in pairwise(whole))
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
