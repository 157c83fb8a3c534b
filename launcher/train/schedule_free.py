"""Schedule-free optimizers: a parameter has two values, one for gradients and an average, which is evaluated and saved.

    z    the sequence that the gradients move; in the optimizer's state
    x    the weighted average of z: evaluated, sampled, saved and exported
    y    (1 - beta1) z + beta1 x: where gradients are taken; in the parameters while the run trains

Source: Defazio et al., The Road Less Scheduled, 2024, https://arxiv.org/abs/2405.15682. The library keeps y and z. Its
`eval()` and `train()` compute x from y and back in place, which rounds: an evaluation would move y by an ulp. Here y is
put back as it was, so that evaluations and saves change no bit of the training.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from launcher.recipe.train_section import TrainSection

COUNTERS = ("k", "weight_sum", "lr_max")  # of a group: updates, and what the average has been weighted with


def keeps_averages(optimizer: Optimizer) -> bool:
    """Whether the optimizer is a schedule-free one."""
    return "train_mode" in optimizer.defaults


def init_sequences(optimizer: Optimizer) -> None:
    """Make the state that the first step would make: z is the parameter itself, as are x and y."""
    for parameter in _parameters(optimizer):
        optimizer.state[parameter] = {
            "z": parameter.detach().clone(memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


@contextmanager
def averages_in_place(optimizer: Any) -> Iterator[None]:
    """Inside, the parameters are x, at the same addresses; afterwards they are y again, bit for bit. Changes nothing
    with other optimizers, before the first step, where all are one, and after `end_with_averages`."""
    if not (keeps_averages(optimizer) and optimizer.param_groups[0]["train_mode"] and optimizer.state):
        yield
        return
    parameters = _parameters(optimizer)
    trained = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():  # what train() computes is y but for rounding
            for parameter, value in zip(parameters, trained, strict=True):
                parameter.copy_(value)


def end_with_averages(optimizer: Any) -> None:
    """Training is over: the parameters are x from now on."""
    if keeps_averages(optimizer):
        optimizer.eval()


def counters_of(optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """What a schedule-free step leaves for the next one beside tensors, by the number of the group; else nothing."""
    groups = optimizer.param_groups if keeps_averages(optimizer) else []
    return {str(number): {name: group[name] for name in COUNTERS} for number, group in enumerate(groups)}


def set_counters(optimizer: Optimizer, counters: Mapping[str, Mapping[str, Any]]) -> None:
    """Go on from what `counters_of` gave."""
    for number, values in counters.items():
        optimizer.param_groups[int(number)].update(values)


def evaluated_adapters(training: Mapping[str, Any], train: TrainSection) -> dict[str, Tensor]:
    """The adapters of a saved state (`training` of train/state.py) as they are evaluated: x where they are y."""
    adapters: dict[str, Tensor] = training["adapters"]
    if train.optimizer != "schedule_free_adamw":
        return adapters
    beta1, state = train.optimizer_parameters()["betas"][0], training["optimizer"]
    return {name: y.lerp(state[name]["z"], 1 - 1 / beta1) for name, y in adapters.items()}


def _parameters(optimizer: Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
