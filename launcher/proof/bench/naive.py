"""The training step of a user without this project: stock modules, gradient checkpointing, autocast, nothing compiled.

It is given every advantage that a careful user has without packing: the documents of a micro batch, sorted by length
and padded to the longest in groups that hold as many positions as our micro batch does (rows that are one full-length
document each are the same [B, S] on both sides); collated beforehand and copied from pinned memory, as data-loader
workers do it; causal attention without a mask, which padding on the right does not need; the optimizer, schedule and
clipping of the recipe; no host synchronisation but the fp16 scaler's.

Letters: D documents of a group, L positions of its longest.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from launcher.data.loader import StepBatch
from launcher.data.pack.micro_batch import IGNORE
from launcher.model.build import choose_dtype
from launcher.proof.stock import grouped, stock_loss, stock_model, supervised_documents
from launcher.train.optim import make_optimizer, schedule
from launcher.train.request import Request
from launcher.train.setup import Prepared


@dataclass(frozen=True)
class Collated:
    """One step batch as the stock model takes it."""

    groups: tuple[tuple[Tensor, Tensor], ...]  # ids and labels, int64 [D, L] each; labels shifted, IGNORE in padding
    supervised_tokens: int


def collate(batch: StepBatch, *, pinned: bool) -> Collated:
    """The documents of each micro batch, in groups that hold at most its positions, padding included."""
    groups = []
    for micro in batch.micro_batches:
        documents = supervised_documents(micro.input_ids, micro.labels, micro.document_ids)
        for group in grouped(documents, positions=micro.input_ids.numel()):
            pair = _padded((ids for ids, _ in group), 0), _padded((labels for _, labels in group), IGNORE)
            groups.append((pair[0].pin_memory(), pair[1].pin_memory()) if pinned else pair)
    return Collated(tuple(groups), batch.supervised_tokens)


class NaiveStep:
    """Model, optimizer, schedule and fp16 scaler."""

    def __init__(self, request: Request, prepared: Prepared) -> None:
        train, self.device = request.recipe.train, prepared.device
        self.dtype = choose_dtype(request.recipe.model.dtype, self.device)
        self.model: Any = stock_model(
            request.recipe, request.source, prepared.config, dtype=self.dtype, device=self.device
        )
        # On CPUs too, where stock_model leaves it out: what is compared is the same everywhere.
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, train, lr=train.lr)
        assert train.steps is not None, "bench_request sets it"
        self.rates, self.updates = schedule(train, steps=train.steps), 0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.clip = float("inf") if train.clip is None else train.clip

    def __call__(self, batch: Collated) -> Tensor:
        """One optimizer step; returns the loss summed over the supervised tokens, fp32 scalar."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for group in batch.groups:
            ids, labels = (tensor.to(self.device, non_blocking=True) for tensor in group)
            # Rows are equally long already, so that stock_loss only stacks them.
            loss = stock_loss(self.model, list(zip(ids, labels, strict=True)), dtype=self.dtype)
            total += loss.detach()
            self.scaler.scale(loss / max(1, batch.supervised_tokens)).backward()
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = self.rates[self.updates]
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:
            self.updates += 1
        return total


def _padded(rows: Iterable[Tensor], value: int) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value)
