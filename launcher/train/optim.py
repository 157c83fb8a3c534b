"""Optimizers and learning-rate schedules: torch, bitsandbytes and transformers provide them all."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from launcher.errors import RecipeError
from launcher.recipe.schema import TrainSection


def check_optimizer(train: TrainSection, device: torch.device) -> None:
    """Raise RecipeError for an optimizer that `device` cannot run as asked: bitsandbytes would silently use another."""
    if train.optimizer.startswith("paged") and device.type != "cuda":
        plain = train.optimizer.removeprefix("paged_")
        raise RecipeError(
            f"train.optimizer={train.optimizer} pages its state between GPU and host, the device is {device.type}. "
            f"Use train.optimizer={plain}."
        )


def make_optimizer(parameters: Sequence[torch.nn.Parameter], train: TrainSection, *, lr: Tensor | float) -> Optimizer:
    """AdamW over the LoRA masters: torch's fused one, which reads the rate from the tensor `lr`, or bitsandbytes' 8-bit
    and paged ones, which read it from their `param_groups`."""
    if train.optimizer == "adamw":
        groups = parameter_groups(parameters, lr=lr)
        return torch.optim.AdamW(groups, lr=lr, weight_decay=train.weight_decay, fused=True)
    from bitsandbytes import optim

    kinds = {"adamw_8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW, "paged_adamw_8bit": optim.PagedAdamW8bit}
    groups = parameter_groups(parameters, lr=train.lr)
    return kinds[train.optimizer](groups, lr=train.lr, weight_decay=train.weight_decay)


def parameter_groups(parameters: Sequence[torch.nn.Parameter], *, lr: Tensor | float) -> Any:
    """The parameters; where some have a `rate_factor` (model/lora.py), a group for each factor, with its own rate."""
    factors = sorted({rate_factor(parameter) for parameter in parameters})
    if factors in ([], [1.0]):
        return parameters
    return [
        {"params": [p for p in parameters if rate_factor(p) == factor], "lr": lr * factor, "rate_factor": factor}
        for factor in factors
    ]


def rate_factor(parameter: torch.nn.Parameter) -> float:
    """What the learning rate is multiplied by for this parameter."""
    return float(getattr(parameter, "rate_factor", 1.0))


def gates_on_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer itself skips an update when its `found_inf` tensor is set (torch's fused ones do)."""
    return bool(optimizer.defaults.get("fused"))


def init_state(optimizer: Any) -> None:
    """Make the state that an optimizer makes in its first step, all zeros, without changing a parameter."""
    if optimizer.state:
        return
    if gates_on_device(optimizer):
        optimizer.found_inf.fill_(1.0)  # each update sets it anew
        optimizer.step()
        return
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, group_index, index)


@contextmanager
def capturable(optimizer: Optimizer) -> Iterator[None]:
    """Mark the optimizer as capturable inside, and only there: torch refuses to capture one without the mark, and warns
    of one that has it and runs uncaptured. The fused optimizer computes the same either way."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["capturable"] = False


class Rates:
    """The learning-rate schedule as a table on the device. A skipped update does not advance it.

    `lr` (fp32 scalar) is what the optimizer reads; `updates` (int64 [1]) counts the updates that were applied.
    """

    def __init__(self, train: TrainSection, *, steps: int, device: torch.device) -> None:
        # fp64, so that the report shows the schedule's own numbers.
        self._table = torch.tensor(schedule(train, steps=steps), dtype=torch.float64, device=device)
        self.updates = torch.zeros(1, dtype=torch.int64, device=device)
        self.lr = torch.zeros((), device=device)

    def load(self) -> Tensor:
        """Set `lr` for this update; returns it in fp64."""
        rate = self._table.index_select(0, self.updates).squeeze(0)
        self.lr.copy_(rate)
        return rate

    def advance(self, applied: Tensor) -> None:
        """`applied`: bool scalar, whether the update was made. The last rate of the table stays."""
        self.updates.add_(applied).clamp_(max=len(self._table) - 1)


def schedule(train: TrainSection, *, steps: int) -> list[float]:
    """The learning rates of a run's updates and one more, [steps + 1]: transformers' cosine, linear or constant
    schedule, each with a linear warm-up."""
    name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    unused = torch.optim.SGD([torch.zeros(1)], lr=train.lr)
    warmup = warmup_steps(train.warmup, steps)
    scheduler = get_scheduler(name, unused, num_warmup_steps=warmup, num_training_steps=steps)
    assert isinstance(scheduler, LambdaLR), "a rate depends on the step alone"
    return [train.lr * float(scheduler.lr_lambdas[0](step)) for step in range(steps + 1)]


def warmup_steps(warmup: float, steps: int) -> int:
    """`train.warmup` in steps: it is steps when it is 1 or more, else a fraction of the run. Warm-up starts from a rate
    of zero, so it is cut to leave at least one step at the full rate."""
    return min(steps - 1, int(warmup) if warmup >= 1 else int(warmup * steps))
