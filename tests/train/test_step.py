"""The step: normalised by the global token count, gated when it is not finite, held when fp16 overflows."""

import math
from copy import deepcopy

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import get_scheduler

from launcher.compile.graphs import CaptureFailed
from launcher.compile.observe import Observer
from launcher.compile.plan import Plan
from launcher.data.loader import StepBatch
from launcher.data.pack.micro_batch import MicroBatch
from launcher.errors import RecipeError
from launcher.recipe.schema import CompileSection, TrainSection
from launcher.train import loss_scale
from launcher.train import step as step_module
from launcher.train.loss_scale import LossScale
from launcher.train.optim import check_optimizer, schedule, warmup_steps
from launcher.train.step import TrainStep

pytestmark = pytest.mark.usefixtures("clean_dynamo")

OPTIMIZERS = ["adamw", "adamw_8bit", "adafactor", "lion", "lion_8bit", "muon", "schedule_free_adamw"]


class Linear(nn.Module):
    """Stands for PackedCausalLM: the loss of a block is a weighted sum of its ids; NaN at the calls `poison_at`."""

    max_seqlen = 4

    def __init__(self, poison_at=()):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.calls, self.poison_at = 0, poison_at

    def loss_rows(self, tokens):
        return tokens

    def forward(self, input_ids, labels, position_ids, document_ids, cu_seqlens):
        self.calls += 1
        poison = float("nan") if self.calls in self.poison_at else 1.0
        return (input_ids.float() @ self.weight).sum() * poison


def micro(value, supervised, blocks=1):
    ids = torch.full((blocks, 4), value)
    boundaries = torch.arange(0, 4 * blocks + 1, 4, dtype=torch.int32)
    return MicroBatch(ids, ids, ids, ids.int(), boundaries, 4 * blocks, supervised)


def step_batch(*micros):
    return StepBatch(tuple(micros), sum(m.tokens for m in micros), sum(m.supervised_tokens for m in micros), 0)


ONES = step_batch(micro(1, 4))


def make_step(model, *, fp16=False, clip=None, optimizer="adamw", steps=10, schedule="constant", warmup=0.0):
    return TrainStep(
        model,
        TrainSection(steps=steps, lr=0.1, schedule=schedule, warmup=warmup, optimizer=optimizer, clip=clip),
        steps=steps,
        plan=Plan([], compile=CompileSection(mode="off"), observer=Observer()),
        accelerator=Accelerator(cpu=True),
        fp16=fp16,
    )


def norms_at_updates(step):
    """A list that gets the norm of the gradient which each update is made with."""
    norms = []
    step.optimizer.register_step_pre_hook(lambda *_: norms.append(step.parameters[0].grad.norm().item()))
    return norms


def test_the_gradient_is_that_of_the_mean_over_all_supervised_tokens_however_they_fall_into_micro_batches():
    gradients = []
    for parts in ([micro(1, 3), micro(5, 1)], [micro(1, 1), micro(5, 3)]):
        step = make_step(Linear())
        step.accumulate(step_batch(*parts))
        gradients.append(step.parameters[0].grad.clone())
    assert torch.allclose(gradients[0], torch.full((4,), 6 / 4))
    assert torch.equal(gradients[0], gradients[1])


def test_each_batch_gives_its_own_loss_whatever_was_in_the_buffers_before():
    step = make_step(Linear())
    batches = [
        [micro(1, 4)], [micro(2, 4)], [micro(3, 4, blocks=2)], [micro(2, 4), micro(7, 1, blocks=2)], [micro(1, 4)],
    ]  # fmt: skip
    assert [float(step.accumulate(step_batch(*parts))) for parts in batches] == [4.0, 8.0, 24.0, 64.0, 4.0]
    assert [float(step.eval_loss(one)) for one in (micro(5, 4), micro(6, 4, blocks=2))] == [20.0, 48.0]
    assert float(step.accumulate(ONES)) == 4.0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fp16", [False, True])
def test_a_nan_loss_never_reaches_the_weights_and_nothing_is_updated_after_it(fp16, optimizer):
    model = Linear(poison_at=(5,))  # the first micro batch of step 3
    step, weights, losses = make_step(model, fp16=fp16, optimizer=optimizer), [], []
    for _ in range(5):
        losses.append(float(step(step_batch(micro(1, 4), micro(1, 4))).loss_sum))
        weights.append(model.weight.detach().clone())
    assert losses[1] < losses[0] and not torch.equal(weights[0], weights[1])
    assert math.isnan(losses[2])
    assert torch.equal(weights[1], weights[2]) and torch.equal(weights[1], weights[4])
    assert torch.isfinite(weights[4]).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_infinite_gradient_is_gated_with_every_kind_of_optimizer(optimizer):
    model = Linear()
    model.weight.register_hook(lambda grad: grad * float("inf"))
    step = make_step(model, optimizer=optimizer)
    assert not math.isfinite(float(step(ONES).grad_norm))
    assert torch.equal(model.weight.detach(), torch.ones(4))


def test_the_loss_scale_follows_overflows_as_torchs_scaler_does(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 2)
    scale, factors = LossScale(torch.device("cpu"), enabled=True), []
    for overflow in (0, 1, 0, 0, 0, 1):
        scale.follow(torch.tensor(float(overflow)))
        factors.append(scale.get_scale() / loss_scale.INITIAL)
    assert factors == [1, 0.5, 0.5, 1, 1, 0.5]
    off = LossScale(torch.device("cpu"), enabled=False)
    off.follow(torch.ones(()))
    assert off.get_scale() == 1


@pytest.mark.parametrize("fp16", [False, True])
def test_one_factor_clips_and_unscales_and_the_norm_before_is_reported(fp16):
    step = make_step(Linear(), clip=0.5, fp16=fp16)
    norms = norms_at_updates(step)
    assert float(step(step_batch(micro(2, 1))).grad_norm) == pytest.approx(4.0)  # a gradient of 2 in each of 4 weights
    assert norms == [pytest.approx(0.5, rel=1e-4)]
    step.accumulate(step_batch(micro(2, 1)))
    assert float(step.parameters[0].grad.norm()) == pytest.approx(4.0 * step.scaler.get_scale())
    assert (step.scaler.get_scale() > 1) == fp16


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [(0.05, 2, 0), (0.5, 10, 5), (10, 2, 1), (3, 100, 3), (0, 5, 0), (1, 1, 0)],
)
def test_warmup_is_steps_or_a_fraction_and_always_leaves_a_step_at_the_full_rate(warmup, steps, expected):
    assert warmup_steps(warmup, steps) == expected


def test_a_paged_optimizer_without_a_gpu_is_refused_rather_than_replaced():
    section = TrainSection(steps=1, optimizer="paged_adamw_8bit")
    with pytest.raises(RecipeError, match="train.optimizer=adamw_8bit"):
        check_optimizer(section, torch.device("cpu"))
    check_optimizer(section, torch.device("cuda"))


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.3, 4])
def test_the_table_of_rates_is_transformers_schedule_and_steps_report_it(name, warmup):
    steps, train = 10, TrainSection(steps=10, lr=0.1, schedule=name, warmup=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    kind = "constant_with_warmup" if name == "constant" else name
    stepped = get_scheduler(kind, optimizer, num_warmup_steps=warmup_steps(warmup, steps), num_training_steps=steps)
    expected = []
    for _ in range(steps + 1):
        expected.append(stepped.get_last_lr()[0])
        optimizer.step()
        stepped.step()
    assert schedule(train, steps=steps) == pytest.approx(expected, rel=1e-12)
    step = make_step(Linear(), schedule=name, warmup=warmup)
    reported = [float(step(ONES).lr) for _ in range(steps + 3)]
    assert reported == pytest.approx([*expected, expected[-1], expected[-1]], rel=1e-12)
    assert len(set(reported)) > 1 or (name, warmup) == ("constant", 0)


def test_the_update_is_torchs_at_the_scheduled_rate_on_the_gradient_of_torchs_clipping():
    plain = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.0)
    step = make_step(Linear(), clip=0.5, schedule="linear", warmup=2)
    rates = schedule(TrainSection(steps=10, lr=0.1, schedule="linear", warmup=2), steps=10)
    for value, lr in zip((1, 2, 3, 1), rates[:4], strict=True):
        plain.grad = torch.full((4,), value / 4.0)
        norm = nn.utils.clip_grad_norm_([plain], 0.5)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        assert float(step(step_batch(micro(value, 4))).grad_norm) == pytest.approx(float(norm))
    torch.testing.assert_close(step.parameters[0].detach(), plain.detach())
    assert not torch.equal(plain.detach(), torch.ones(4))


class UncapturedGraphs:
    """Stands for Graphs where there is no CUDA: rehearses as it does, and makes the calls that it would replay."""

    fails = False

    def __init__(self, device):
        pass

    def rehearse(self, work):
        work()
        work()

    def capture(self, work):
        if self.fails:
            raise CaptureFailed("it waits")
        return list(work)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fp16", [False, True])
def test_rehearsal_and_capture_change_nothing_and_the_steps_go_on_as_without(monkeypatch, fp16, optimizer, fails):
    monkeypatch.setattr(step_module, "Graphs", UncapturedGraphs)
    monkeypatch.setattr(UncapturedGraphs, "fails", fails)
    batches = [step_batch(micro(n, 3), micro(2 * n, 1)) for n in (3, 1, 2, 5)]
    plain, captured = (make_step(Linear(), fp16=fp16, clip=0.5, optimizer=optimizer, warmup=3) for _ in range(2))
    expected = [plain(batch).metrics.tolist() for batch in batches]
    captured.rehearse([micro(9, 4)])
    metrics = [captured(batches[0]).metrics.tolist()]
    before = deepcopy(captured.live_state())
    captured.rehearse([micro(9, 4)])
    if fails:
        with pytest.raises(CaptureFailed):
            captured.capture([micro(9, 4)])
    else:
        captured.capture([micro(9, 4)])()
    torch.testing.assert_close(captured.live_state(), before, rtol=0, atol=0)
    assert not any(parameter.grad.any() for parameter in captured.parameters)
    metrics += [captured(batch).metrics.tolist() for batch in batches[1:]]
    assert metrics == expected
    assert not captured.optimizer.param_groups[0].get("capturable")
    assert len({loss for loss, *_ in metrics}) == 4


def test_a_capture_before_the_first_step_leaves_an_optimizer_that_has_made_none(monkeypatch):
    monkeypatch.setattr(step_module, "Graphs", UncapturedGraphs)
    step = make_step(Linear())
    step.capture([micro(9, 4)])()
    [state] = step.optimizer.state.values()
    assert not any(value.any() for value in state.values())
    step(ONES)
    assert float(state["step"]) == 1
