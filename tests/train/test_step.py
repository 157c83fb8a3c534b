"""The step: normalised by the global token count, gated when it is not finite, held when fp16 overflows."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from launcher.compile.observe import Observer
from launcher.compile.plan import Plan
from launcher.data.loader import MicroBatch, StepBatch
from launcher.errors import RecipeError
from launcher.recipe.schema import CompileSection, TrainSection
from launcher.train.optim import check_optimizer, warmup_steps
from launcher.train.step import TrainStep

pytestmark = pytest.mark.usefixtures("clean_dynamo")


class Linear(nn.Module):
    """A stand-in with PackedCausalLM's signature: the loss of a row is a weighted sum of its ids."""

    def __init__(self, poison_at=()):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.calls, self.poison_at = 0, poison_at

    def forward(self, input_ids, labels, position_ids, document_ids, cu_seqlens):
        self.calls += 1
        poison = float("nan") if self.calls in self.poison_at else 1.0
        return (input_ids.float() @ self.weight).sum() * poison


def micro(value, supervised):
    ids = torch.full((1, 4), value)
    return MicroBatch(ids, ids, ids, ids.int(), torch.tensor([0, 4], dtype=torch.int32), 4, supervised)


def step_batch(*micros):
    return StepBatch(tuple(micros), sum(m.tokens for m in micros), sum(m.supervised_tokens for m in micros), 0)


def make_step(model, *, fp16=False, clip=None, optimizer="adamw", steps=10, schedule="constant", warmup=0.0):
    return TrainStep(
        model,
        TrainSection(steps=steps, lr=0.1, schedule=schedule, warmup=warmup, optimizer=optimizer, clip=clip),
        steps=steps,
        plan=Plan([], compile=CompileSection(mode="off"), observer=Observer()),
        accelerator=Accelerator(cpu=True),
        fp16=fp16,
    )


def test_the_gradient_is_that_of_the_mean_over_all_supervised_tokens_however_they_fall_into_micro_batches():
    gradients = []
    for parts in ([micro(1, 3), micro(5, 1)], [micro(1, 1), micro(5, 3)]):
        step = make_step(Linear())
        step.accumulate(step_batch(*parts))
        gradients.append(step.parameters[0].grad.clone())
    assert torch.allclose(gradients[0], torch.full((4,), 6 / 4))
    assert torch.equal(gradients[0], gradients[1])


def test_a_nan_loss_never_reaches_the_weights_and_nothing_is_updated_after_it():
    model = Linear(poison_at=(3,))
    step, weights, losses = make_step(model), [], []
    for _ in range(5):
        losses.append(float(step(step_batch(micro(1, 4))).loss_sum))
        weights.append(model.weight.detach().clone())
    assert not torch.equal(weights[0], weights[1])
    assert math.isnan(losses[2])
    assert torch.equal(weights[1], weights[2])
    assert torch.equal(weights[1], weights[4])
    assert torch.isfinite(weights[4]).all()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_an_infinite_gradient_is_gated_with_every_kind_of_optimizer(optimizer):
    model = Linear()
    model.weight.register_hook(lambda grad: grad * float("inf"))
    step = make_step(model, optimizer=optimizer)
    result = step(step_batch(micro(1, 4)))
    assert not math.isfinite(float(result.grad_norm))
    assert torch.equal(model.weight.detach(), torch.ones(4))


def test_clipping_bounds_the_update_and_reports_the_norm_before():
    model = Linear()
    step = make_step(model, clip=0.5)
    seen = []
    step.optimizer.register_step_pre_hook(lambda *_: seen.append(model.weight.grad.norm().item()))
    result = step(step_batch(micro(2, 1)))
    assert float(result.grad_norm) == pytest.approx(4.0)  # a gradient of 2 in each of 4 weights
    assert seen == [pytest.approx(0.5, rel=1e-4)]


def test_fp16_overflow_skips_the_update_halves_the_scale_and_holds_the_schedule():
    model = Linear()
    overflow = {"on": True}
    model.weight.register_hook(lambda grad: grad * (float("inf") if overflow["on"] else 1.0))
    step = make_step(model, fp16=True, schedule="linear")
    scale = step.scaler.get_scale()
    first = step(step_batch(micro(1, 4)))
    assert first.skipped
    assert step.scaler.get_scale() == scale / 2
    assert torch.equal(model.weight.detach(), torch.ones(4))
    overflow["on"] = False
    second = step(step_batch(micro(1, 4)))
    assert not second.skipped
    assert second.lr == first.lr
    assert not torch.equal(model.weight.detach(), torch.ones(4))
    assert step(step_batch(micro(1, 4))).lr < second.lr


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


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_every_optimizer_and_schedule_lowers_a_loss(optimizer, schedule):
    model = Linear()
    step = make_step(model, optimizer=optimizer, schedule=schedule, warmup=1)
    losses = [float(step(step_batch(micro(1, 4))).loss_sum) for _ in range(5)]
    assert losses[-1] < losses[0]
