"""One optimizer step: accumulate, normalise by the global count of supervised tokens, clip, gate, update.

The gradient wanted is that of (sum of token losses over all micro batches and ranks) / N, with N their supervised
tokens. Each micro batch contributes loss_sum / N, and the ranks' gradients are summed. N is known on the host before
the step, since the packing is the same on every rank: no collective, no wait.

A step is the same few calls whether or not they are captured in CUDA graphs (graphs.py):

    clear      gradients and loss of the step, one fill
    train      for each micro batch, of its shape: forward, backward, accumulation; reads staging.py's buffer
    reduce     over the ranks, one collective; never captured
    update     norm, clipping, gate, optimizer, loss scale, learning rate; writes the step's metrics

`train`, `update` and the evaluation's forward read and write tensors that stay where they are.

A non-finite step must not reach the weights, and the host must not have to ask. So:
- the update is gated on the device by `found_inf`, set from the gradient norm (reduced already: alike on all ranks);
- the first non-finite loss or gradient raises a flag that turns every later loss into NaN, which closes the gate on all
  ranks until the host reads the figures and stops: the weights are those of the last good step.
fp16 differs: an overflowing gradient is ordinary there; it skips the update, halves the scale and holds the schedule,
all on the device too. bitsandbytes' optimizers have no gate and want a rate from the host, which asks for both.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from launcher.compile.graphs import Graphs, Work
from launcher.compile.plan import Plan
from launcher.data.loader import StepBatch
from launcher.data.pack.micro_batch import MicroBatch
from launcher.model.packed import PackedCausalLM
from launcher.recipe.schema import TrainSection
from launcher.train.gradients import FlatGradients
from launcher.train.loss_scale import LossScale
from launcher.train.optim import Rates, capturable, gates_on_device, make_optimizer
from launcher.train.staging import Staging


@dataclass(frozen=True)
class StepResult:
    """What the device knows of one step, fp64 [4]; reading it waits for the device."""

    metrics: Tensor

    @property
    def loss_sum(self) -> Tensor:
        """Over all micro batches and ranks."""
        return self.metrics[0]

    @property
    def grad_norm(self) -> Tensor:
        """Before clipping, over all ranks."""
        return self.metrics[1]

    @property
    def lr(self) -> Tensor:
        return self.metrics[2]

    @property
    def skipped(self) -> Tensor:
        """1 where fp16 overflowed."""
        return self.metrics[3]


@dataclass
class Calls:
    """What is done with a micro batch of one shape, once it lies in `staging`."""

    staging: Staging
    train: Work
    evaluate: Work


class TrainStep:
    """Owns gradients, optimizer, schedule over `steps` and fp16 loss scale of `model`, the packed one."""

    def __init__(
        self,
        model: PackedCausalLM,
        train: TrainSection,
        *,
        steps: int,
        plan: Plan,
        accelerator: Accelerator,
        fp16: bool,
    ) -> None:
        device = self._device = accelerator.device
        self.model = model
        self.plan = plan
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients = FlatGradients(self.parameters)
        self._rates = Rates(train, steps=steps, device=device)
        self.optimizer = make_optimizer(self.parameters, train, lr=self._rates.lr)
        self.scaler = LossScale(device, enabled=fp16)
        self._clip = train.clip
        self._nan = torch.full((), float("nan"), device=device)
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._found_inf = torch.zeros((), device=device)
        self._metrics = torch.zeros(4, dtype=torch.float64, device=device)
        self._eval_loss = torch.zeros((), device=device)
        if gates_on_device(self.optimizer):
            self.optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]
        self._calls: dict[tuple[torch.Size, ...], Calls] = {}
        self._update: Work = self._run_update

    def __call__(self, batch: StepBatch) -> StepResult:
        """Run the step. Raises ContractError (strict) from a compile error; never waits for the device but with
        bitsandbytes' optimizers."""
        self.plan.call(self.accumulate, batch)
        self._update()
        return StepResult(self._metrics.clone())

    def accumulate(self, batch: StepBatch) -> Tensor:
        """Gradients of the step batch, over all ranks, into `.grad`, times the loss scale; returns its summed loss,
        fp32 scalar. Both are overwritten by the next step."""
        self._gradients.clear()
        factor = 1 / max(1, batch.supervised_tokens)
        for micro in batch.micro_batches:
            self._loaded(micro, factor=factor).train()
        self._gradients.reduce()
        return self._gradients.loss_sum

    def eval_loss(self, micro: MicroBatch) -> Tensor:
        """This rank's summed loss of one micro batch without gradients, fp32 scalar; overwritten by the next call."""
        self._loaded(micro).evaluate()
        return self._eval_loss

    def rehearse(self, samples: Sequence[MicroBatch]) -> None:
        """Train and evaluate once with each of `samples`; leaves no trace but compiled code."""
        with self._no_trace():
            for sample in samples:
                calls = self._loaded(sample)
                calls.train()
                calls.evaluate()

    def capture(self, samples: Sequence[MicroBatch]) -> Work:
        """Record the calls for the shapes of `samples` (largest first), and the update, in CUDA graphs; returns what
        puts these in their place.

        Leaves no trace in weights, optimizer or loss scale, and random numbers drawn where there is dropout. Raises
        CaptureFailed, and goes on uncaptured; ContractError for a compilation.
        """
        graphs = Graphs(self._device)
        calls = [self._loaded(sample) for sample in samples]
        update = [self._run_update] if gates_on_device(self.optimizer) else []
        work = [*(one for call in calls for one in (call.train, call.evaluate)), *update]

        def all_work() -> None:
            for one in work:
                one()

        with self._no_trace():
            graphs.rehearse(lambda: self.plan.call(all_work))
            with capturable(self.optimizer):
                replays = graphs.capture(work)

        def install() -> None:
            for call, train, evaluate in zip(calls, replays[::2], replays[1::2], strict=False):
                call.train, call.evaluate = train, evaluate
            if update:
                self._update = replays[-1]

        return install

    @contextmanager
    def _no_trace(self) -> Iterator[None]:
        """Inside, the gate is closed: updates change nothing, the optimizer's state is made and stays at its zeros."""
        scale = self.scaler.saved()
        self._bad.fill_(True)
        try:
            yield
        finally:
            self._bad.fill_(False)
            self.scaler.restore(scale)
            self._gradients.clear()

    def _loaded(self, micro: MicroBatch, *, factor: float = 0.0) -> Calls:
        """The calls for the shape of `micro`, which is sent to the device."""
        most = self.model.loss_rows(micro.labels.numel())
        # The loss sees it too, but only on the device and as a NaN.
        assert micro.supervised_tokens <= most, f"{micro.supervised_tokens} targets where the data has at most {most}"
        most, found = self.model.max_seqlen, int(micro.cu_seqlens.diff().max())
        assert found <= most, f"{found} tokens of a document where attention is told that none has more than {most}"
        fields = arguments(micro)
        shape = tuple(field.shape for field in fields)
        if shape not in self._calls:
            staging = Staging(fields, self._device)
            self._calls[shape] = Calls(staging, lambda: self._train(staging), lambda: self._evaluate(staging))
        calls = self._calls[shape]
        calls.staging.fill(fields, factor=factor)
        return calls

    def _train(self, staging: Staging) -> None:
        loss = self.model(*staging.inputs())
        seen = loss.detach()
        factor = torch.where(self._bad | ~torch.isfinite(seen), self._nan, staging.factor * self.scaler.value)
        # Not backward(): it would add each parameter's gradient with a kernel of its own.
        self._gradients.add(torch.autograd.grad(loss, self.parameters, grad_outputs=factor), seen)

    @torch.no_grad()
    def _evaluate(self, staging: Staging) -> None:
        self._eval_loss.copy_(self.model(*staging.inputs()))

    @torch.no_grad()
    def _run_update(self) -> None:
        """Apply the update unless it is not finite; everything that follows from that is decided on the device."""
        loss, norm = self._gradients.loss_sum, self._gradients.norm() / self.scaler.value
        overflow = ~torch.isfinite(norm)
        fp16 = self.scaler.is_enabled()
        # In fp16 an overflowing gradient is ordinary, such a loss is not. A non-finite loss on any rank has made every
        # rank's loss and norm non-finite.
        self._bad |= ~torch.isfinite(loss) if fp16 else overflow
        stays = self._bad | overflow
        self._found_inf.copy_(stays)
        lr = self._rates.load()
        skipped = overflow if fp16 else torch.zeros_like(overflow)
        self._metrics.copy_(torch.stack([loss.double(), norm.double(), lr, skipped.double()]))
        self._scale_and_clip(norm)
        self._step_optimizer()
        self.scaler.follow(overflow.float())
        self._rates.advance(~stays)

    def _scale_and_clip(self, norm: Tensor) -> None:
        """One factor for both: 1 / loss scale, and clip / norm where the norm is larger
        (torch.nn.utils.clip_grad_norm_'s rule, its 1e-6 included)."""
        if self._clip is None and not self.scaler.is_enabled():
            return
        shrink = torch.ones_like(norm) if self._clip is None else (self._clip / (norm + 1e-6)).clamp(max=1.0)
        self._gradients.multiply(shrink / self.scaler.value)

    def _step_optimizer(self) -> None:
        if gates_on_device(self.optimizer):
            self.optimizer.step()
        elif not bool(self._found_inf):  # waits for the device: bitsandbytes' optimizers have no gate
            for group in self.optimizer.param_groups:
                group["lr"] = float(self._rates.lr)
            self.optimizer.step()


def arguments(micro: MicroBatch) -> tuple[Tensor, ...]:
    """A micro batch in the order of PackedCausalLM.forward."""
    return micro.input_ids, micro.labels, micro.position_ids, micro.document_ids, micro.cu_seqlens
