"""One optimizer step: accumulate, normalise by the global count of supervised tokens, clip, gate, update.

The gradient wanted is that of (sum of token losses over all micro batches and ranks) / N, with N their supervised
tokens. DDP averages over W ranks, so each micro batch contributes loss_sum * W / N. N is known on the host before the
step, since the packing is the same on every rank: no collective, no wait.

A non-finite step must not reach the weights, and the host must not have to ask. So:
- the update is gated on the device by `found_inf`, set from the gradient norm (reduced already: alike on all ranks);
- the first non-finite loss or gradient raises a flag that turns every later loss into NaN, which closes the gate on all
  ranks until the host reads the figures and stops: the weights are those of the last good step.
fp16 differs: overflow is ordinary there, the scaler skips the step and halves its scale, and the host waits for the
answer each step, because a skipped step must not advance the schedule.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from launcher.compile.plan import Plan
from launcher.data.loader import MicroBatch, StepBatch
from launcher.recipe.schema import TrainSection
from launcher.train.optim import gates_on_device, make_optimizer, make_schedule

NO_CLIP = float("inf")


@dataclass
class StepResult:
    """What the device knows of one step; reading a tensor waits for it."""

    loss_sum: Tensor  # fp32 scalar: this rank's, over all micro batches
    grad_norm: Tensor  # fp32 scalar: before clipping, over all ranks
    lr: float
    skipped: bool  # fp16 overflow


class TrainStep:
    """Owns optimizer, schedule over `steps` and fp16 scaler; `model` is the packed one or its DDP wrapper."""

    def __init__(
        self,
        model: nn.Module,
        train: TrainSection,
        *,
        steps: int,
        plan: Plan,
        accelerator: Accelerator,
        fp16: bool,
    ) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, train)
        self.schedule = make_schedule(self.optimizer, train, steps=steps)
        self.plan = plan
        self.accelerator = accelerator
        self.clip = NO_CLIP if train.clip is None else train.clip
        device = accelerator.device
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self._fp16 = fp16
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._nan = torch.full((), float("nan"), device=device)

    def __call__(self, batch: StepBatch) -> StepResult:
        """Run the step. Raises ContractError (strict) from a compile error; never waits for the device but in fp16."""
        loss_sum = self.plan.call(self.accumulate, batch)
        self.scaler.unscale_(self.optimizer)  # without fp16 these scaler calls do nothing
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        lr = float(self.schedule.get_last_lr()[0])
        skipped = self._update(loss_sum, norm)
        if not skipped:
            self.schedule.step()
        return StepResult(loss_sum, norm, lr, skipped)

    def accumulate(self, batch: StepBatch) -> Tensor:
        """Gradients of the whole step batch into `.grad`; returns this rank's summed loss."""
        self.optimizer.zero_grad(set_to_none=False)
        device = self.accelerator.device
        factor = torch.full((), self.accelerator.num_processes / max(1, batch.supervised_tokens), device=device)
        total = torch.zeros((), device=device)
        last = len(batch.micro_batches) - 1
        for index, micro in enumerate(batch.micro_batches):
            with self._synchronised(index == last):
                loss = self.model(*arguments(micro.to(device)))
                total += loss.detach()
                wanted = loss * torch.where(self._bad | ~torch.isfinite(loss.detach()), self._nan, factor)
                self.scaler.scale(wanted).backward()
        return total

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange gradients once a step, in its last micro batch."""
        context: AbstractContextManager[None] = nullcontext() if last else self.accelerator.no_sync(self.model)
        return context

    def _update(self, loss_sum: Tensor, norm: Tensor) -> bool:
        """Apply the update unless it is not finite; True when fp16 overflow skipped it."""
        if self._fp16:
            self._bad |= ~torch.isfinite(loss_sum)  # an overflowing gradient is ordinary, such a loss is not
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return self.scaler.get_scale() < before  # waits for the device
        self._bad |= ~torch.isfinite(norm)  # a non-finite loss on any rank has made every rank's norm NaN
        if gates_on_device(self.optimizer):
            self.optimizer.found_inf = self._bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bool(self._bad):  # waits for the device: bitsandbytes' optimizers have no gate
            self.optimizer.step()
        return False


def arguments(micro: MicroBatch) -> tuple[Tensor, ...]:
    """A micro batch in the order of PackedCausalLM.forward."""
    return micro.input_ids, micro.labels, micro.position_ids, micro.document_ids, micro.cu_seqlens
