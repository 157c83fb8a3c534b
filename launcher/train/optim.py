"""Optimizers and learning-rate schedules: torch, bitsandbytes and transformers provide them all."""

from collections.abc import Iterable

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
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


def make_optimizer(parameters: Iterable[torch.nn.Parameter], train: TrainSection) -> Optimizer:
    """AdamW over the LoRA masters: torch's fused one, or bitsandbytes' 8-bit and paged forms."""
    wanted = list(parameters)
    if train.optimizer == "adamw":
        return torch.optim.AdamW(wanted, lr=train.lr, weight_decay=train.weight_decay, fused=True)
    from bitsandbytes import optim

    made = {"adamw_8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW, "paged_adamw_8bit": optim.PagedAdamW8bit}
    return made[train.optimizer](wanted, lr=train.lr, weight_decay=train.weight_decay)


def gates_on_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer itself skips an update when its `found_inf` tensor is set (torch's fused ones do)."""
    return bool(optimizer.defaults.get("fused"))


def warmup_steps(warmup: float, steps: int) -> int:
    """`train.warmup`: steps when it is 1 or more, else a fraction of the run. Warm-up starts from a rate of zero, so it
    is cut to leave the run at least one step at the full rate."""
    return min(steps - 1, int(warmup) if warmup >= 1 else int(warmup * steps))


def make_schedule(optimizer: Optimizer, train: TrainSection, *, steps: int) -> LRScheduler:
    """Cosine, linear or constant, each with a linear warm-up."""
    name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps(train.warmup, steps), num_training_steps=steps)
