"""Optimizers and learning-rate schedules: torch, bitsandbytes, transformers and schedulefree provide them all.

Only torch's fused AdamW skips an update by itself, by a flag on the device, and can be captured in a CUDA graph. Before
an update of the others the host reads the flag and hands the rate over.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from launcher.errors import RecipeError
from launcher.recipe.train_section import TrainSection
from launcher.train.schedule_free import init_sequences, keeps_averages

Named = list[tuple[str, nn.Parameter]]

LIBRARIES = {  # train.optimizer: the library and its class
    "adamw": ("torch.optim", "AdamW"),
    "adamw_8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "paged_adamw": ("bitsandbytes.optim", "PagedAdamW"),
    "paged_adamw_8bit": ("bitsandbytes.optim", "PagedAdamW8bit"),
    # Not torch's Adafactor: that scales a rate by the size of the weights, and LoRA's B begins at zero.
    "adafactor": ("transformers", "Adafactor"),
    "lion": ("bitsandbytes.optim", "Lion"),
    "lion_8bit": ("bitsandbytes.optim", "Lion8bit"),
    "paged_lion": ("bitsandbytes.optim", "PagedLion"),
    "paged_lion_8bit": ("bitsandbytes.optim", "PagedLion8bit"),
    "muon": ("torch.optim", "Muon"),
    "schedule_free_adamw": ("schedulefree", "AdamWScheduleFree"),
}
FIXED: dict[str, dict[str, Any]] = {  # arguments that make train.lr mean the same for all
    "adamw": {"fused": True},
    "adafactor": {"scale_parameter": False, "relative_step": False},
    "muon": {"adjust_lr_fn": "match_rms_adamw"},
    "schedule_free_adamw": {"warmup_steps": 0},  # train.warmup is in the rates already
}
OPTIONAL = {"schedulefree": "schedulefree>=1.4"}  # a library that not every installation has: what pip takes


def check_optimizer(train: TrainSection, device: torch.device) -> None:
    """Raise RecipeError for an optimizer that the installed libraries lack, or that `device` cannot run as asked:
    bitsandbytes would silently use another."""
    on_host = device.type != "cuda"
    if train.optimizer.startswith("paged") and on_host:
        plain = train.optimizer.removeprefix("paged_")
        raise RecipeError(
            f"train.optimizer={train.optimizer} pages its state between GPU and host, the device is {device.type}. "
            f"Use train.optimizer={plain}."
        )
    if not _has_optimizer(train.optimizer):
        library, name = LIBRARIES[train.optimizer]
        there = [one for one in LIBRARIES if _has_optimizer(one) and not (one.startswith("paged") and on_host)]
        remedy = f"run: pip install '{OPTIONAL[library]}'" if library in OPTIONAL else f"upgrade {library}."
        lacks = "is not installed" if library in OPTIONAL else "the installed version lacks"
        raise RecipeError(
            f"train.optimizer={train.optimizer} is {name} of {library}, which {lacks}.\n"
            f"Those that are there: {', '.join(there)}. Use one, or {remedy}"
        )


def _has_optimizer(name: str) -> bool:
    try:
        optimizer_class(name)
    except (ImportError, AttributeError):
        return False
    return True


def optimizer_class(name: str) -> Callable[..., Optimizer]:
    """The class behind a name of train.optimizer. Raises ImportError or AttributeError where its library lacks it."""
    library, attribute = LIBRARIES[name]
    return getattr(import_module(library), attribute)


def make_optimizer(model: nn.Module, train: TrainSection, *, lr: Tensor | float) -> Optimizer:
    """The recipe's optimizer over the trained parameters of `model`. Torch's fused AdamW reads the rate from `lr`,
    which may be a tensor, the others read it from their `param_groups`."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    kind, options = train.optimizer, train.optimizer_parameters()
    if kind == "muon":
        return _muon(named, train, options)
    rate = lr if kind == "adamw" else train.lr
    groups = parameter_groups(named, train, lr=rate)
    optimizer: Any = optimizer_class(kind)(groups, lr=rate, **options, **FIXED.get(kind, {}))
    if keeps_averages(optimizer):
        optimizer.train()
        optimizer.state.clear()  # of the empty entries that train() has made
    return optimizer


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], train: TrainSection, *, lr: Tensor | float
) -> list[dict[str, Any]]:
    """The parameters as an optimizer takes them: in as few groups as may be, since each is a launch. Vectors (norms,
    biases, magnitudes) have no weight decay, nor have trained tokens: towards zero is not towards the base. Where some
    have a `rate_factor` (model/lora.py), a group has its own rate.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for _, parameter in named:
        decay = train.weight_decay if parameter.ndim > 1 and getattr(parameter, "decays", True) else 0.0
        groups.setdefault((decay, rate_factor(parameter)), []).append(parameter)
    one_rate = all(factor == 1 for _, factor in groups)
    return [
        {"params": parameters, "weight_decay": decay} | ({} if one_rate else {"lr": lr * factor, "rate_factor": factor})
        for (decay, factor), parameters in groups.items()
    ]


def _muon(named: Named, train: TrainSection, options: dict[str, Any]) -> Optimizer:
    """Muon over LoRA's matrices, AdamW over whatever else is trained: Muon is not made for vectors and embeddings."""
    matrices = [(name, parameter) for name, parameter in named if parameter.ndim == 2 and "lora_" in name]
    rest = [(name, parameter) for name, parameter in named if parameter.ndim != 2 or "lora_" not in name]
    made: list[Optimizer] = []
    for kind, parameters, arguments in (("muon", matrices, options), ("adamw", rest, {})):
        if parameters:
            groups = parameter_groups(parameters, train, lr=train.lr)
            made.append(optimizer_class(kind)(groups, lr=train.lr, **arguments, **FIXED[kind]))
    return SideBySide(made)


class SideBySide(Optimizer):
    """Several optimizers, each over its own parameters, stepped as one; their groups and states are its own."""

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        super().__init__([group for one in self.optimizers for group in one.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()
            self.state.update(optimizer.state)


def rate_factor(parameter: nn.Parameter) -> float:
    """What the learning rate is multiplied by for this parameter."""
    return float(getattr(parameter, "rate_factor", 1.0))


def gates_on_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer itself skips an update when its `found_inf` tensor is set (torch's fused ones do)."""
    return bool(optimizer.defaults.get("fused"))


def init_state(optimizer: Any) -> None:
    """Make the state that an optimizer makes in its first step, all zeros (but for a copy of the parameters), without
    changing a parameter."""
    if optimizer.state:
        return
    if gates_on_device(optimizer):
        optimizer.found_inf.fill_(1.0)  # each update sets it anew
        optimizer.step()
    elif hasattr(optimizer, "init_state"):  # bitsandbytes'
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                optimizer.init_state(group, parameter, group_index, index)
    elif keeps_averages(optimizer):
        init_sequences(optimizer)
    else:
        _step_in_vain(optimizer)


@torch.no_grad()
def _step_in_vain(optimizer: Optimizer) -> None:
    """Make a step, put the parameters back, and zero the state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.clone() for parameter in parameters]
    optimizer.step()
    for parameter, value in zip(parameters, before, strict=True):
        parameter.copy_(value)
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.zero_() if isinstance(value, Tensor) else type(value)(0)


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
    """The learning rates of a run's updates and one more, [steps + 1]: transformers' schedule of the name, with a
    linear warm-up."""
    name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    unused = torch.optim.SGD([torch.zeros(1)], lr=train.lr)
    warmup, options = warmup_steps(train.warmup, steps), train.schedule_parameters()
    if "num_decay_steps" in options:
        decay = options["num_decay_steps"]
        options["num_decay_steps"] = min(steps - warmup, int(decay) if decay >= 1 else max(1, int(decay * steps)))
    scheduler = get_scheduler(
        name, unused, num_warmup_steps=warmup, num_training_steps=steps, scheduler_specific_kwargs=options
    )
    assert isinstance(scheduler, LambdaLR), "a rate depends on the step alone"
    return [train.lr * float(scheduler.lr_lambdas[0](step)) for step in range(steps + 1)]


def warmup_steps(warmup: float, steps: int) -> int:
    """`train.warmup` in steps: it is steps when it is 1 or more, else a fraction of the run. Warm-up starts from a rate
    of zero, so it is cut to leave at least one step at the full rate."""
    return min(steps - 1, int(warmup) if warmup >= 1 else int(warmup * steps))
