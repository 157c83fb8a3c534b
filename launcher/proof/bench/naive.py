"""The training step of a user without this project: stock modules, autocast, nothing compiled; with gradient
checkpointing, as it is recommended for small cards, or plain.

It has every advantage that a careful user has without packing: documents are sorted by length and padded in groups as
large as our micro batches (so full blocks of one document have the same shape on both sides); batches are collated
beforehand and copied from pinned memory, as data-loader workers do it; there is no attention mask; optimizer, schedule
and clipping are the recipe's; and nothing but the fp16 scaler makes the host wait for the device.
"""

from typing import Any

import torch
from torch import Tensor, nn

from launcher.model.build import choose_dtype
from launcher.proof.stock import PaddedBatch, accumulate, stock_model
from launcher.train.inputs import Prepared
from launcher.train.optim import make_optimizer, schedule
from launcher.train.request import Request


class NaiveStep:
    """Model, optimizer, schedule and fp16 scaler."""

    def __init__(self, request: Request, prepared: Prepared, *, checkpointed: bool) -> None:
        recipe, device = request.recipe, prepared.device
        train = recipe.train
        self.dtype = choose_dtype(recipe.model.dtype, device)
        how: Any = {"dtype": self.dtype, "device": device, "token_ids": prepared.token_ids}
        self.model: Any = stock_model(recipe, request.source, prepared.config, **how)
        if checkpointed:  # on CPUs too, where stock_model leaves it out: the comparison is the same everywhere
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.model, train, lr=train.lr)
        assert train.steps is not None, "bench_inputs sets it"
        self.rates, self.updates = schedule(train, steps=train.steps), 0
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.clip = float("inf") if train.clip is None else train.clip

    def __call__(self, batch: PaddedBatch) -> Tensor:
        """One optimizer step; returns the loss summed over the supervised tokens, fp32 scalar."""
        self.optimizer.zero_grad()
        total = accumulate(self.model, batch, self.scaler, dtype=self.dtype)
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = self.rates[self.updates] * parameter_group.get("rate_factor", 1.0)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # a lower scale: the step was skipped
            self.updates += 1
        return total
