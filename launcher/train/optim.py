"""Optimizers and learning-rate schedules: torch, bitsandbytes and transformers provide them all."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from launcher.errors import RecipeError
from launcher.recipe.schema import TrainSection


def check_optimizer(train: TrainSection, device: torch.device) -> None:
    """Raise RecipeError for an optimizer that would silently be another one on `device`."""
    if train.optimizer.startswith("paged") and device.type != "cuda":
        plain = train.optimizer.removeprefix("paged_")
        raise RecipeError(
            f"train.optimizer={train.optimizer} pages its state between GPU and host, the device is {device.type}. "
            f"Use train.optimizer={plain}."
        )


def make_optimizer(parameters: Sequence[torch.nn.Parameter], train: TrainSection, *, lr: Tensor | float) -> Optimizer:
    """AdamW over the LoRA masters: torch's fused one, which reads its rate from `lr` where that is a tensor, or
    bitsandbytes' 8-bit and paged forms, which want it in their `param_groups` before each step."""
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=train.weight_decay, fused=True)
    from bitsandbytes import optim

    made = {"adamw_8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW, "paged_adamw_8bit": optim.PagedAdamW8bit}
    return made[train.optimizer](parameters, lr=train.lr, weight_decay=train.weight_decay)


def gates_on_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer itself skips an update when its `found_inf` tensor is set (torch's fused ones do)."""
    return bool(optimizer.defaults.get("fused"))


@contextmanager
def capturable(optimizer: Optimizer) -> Iterator[None]:
    """While it is captured, and only then: torch refuses to capture an optimizer that is not marked so, and warns of
    one that is marked and runs uncaptured. The fused one computes the same either way."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["capturable"] = False


class Rates:
    """The schedule as a table on the device, and the update that is next: a skipped one does not advance it.

    `lr` (fp32 scalar) is what the optimizer reads.
    """

    def __init__(self, train: TrainSection, *, steps: int, device: torch.device) -> None:
        # fp64, so that what is reported is the schedule's own figure.
        self._table = torch.tensor(schedule(train, steps=steps), dtype=torch.float64, device=device)
        self._updates = torch.zeros(1, dtype=torch.int64, device=device)
        self.lr = torch.zeros((), device=device)

    def load(self) -> Tensor:
        """Set `lr` for this update; returns it in fp64."""
        now = self._table.index_select(0, self._updates).squeeze(0)
        self.lr.copy_(now)
        return now

    def advance(self, done: Tensor) -> None:
        """`done`: bool scalar, whether the update was applied. The last rate of the table stays."""
        self._updates.add_(done).clamp_(max=len(self._table) - 1)


def schedule(train: TrainSection, *, steps: int) -> list[float]:
    """The rates of a run's updates and the one after them, [steps + 1]: cosine, linear or constant, each with a linear
    warm-up, as transformers makes them."""
    name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    unused = torch.optim.SGD([torch.zeros(1)], lr=train.lr)
    warmup = warmup_steps(train.warmup, steps)
    made = get_scheduler(name, unused, num_warmup_steps=warmup, num_training_steps=steps)
    assert isinstance(made, LambdaLR), "a rate is a function of the step alone"
    return [train.lr * float(made.lr_lambdas[0](step)) for step in range(steps + 1)]


def warmup_steps(warmup: float, steps: int) -> int:
    """`train.warmup`: steps when it is 1 or more, else a fraction of the run. Warm-up starts from a rate of zero, so it
    is cut to leave the run at least one step at the full rate."""
    return min(steps - 1, int(warmup) if warmup >= 1 else int(warmup * steps))
