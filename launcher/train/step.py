"""One optimizer step: accumulate, normalise by the global count of supervised tokens, clip, gate, update.

The gradient is that of (sum of token losses over all micro batches and ranks) / N, where N is the number of their
supervised tokens. Each micro batch contributes its loss sum / N, and the ranks' gradients are summed. The host knows N
before the step, because the packing is the same on every rank: no collective, no wait.

A step makes the same few calls whether or not they are captured in CUDA graphs (compile/graphs.py):

    clear      zero the gradients and the loss of the step, one fill
    train      for each micro batch, by its shape: forward, backward, accumulate; reads the buffer of staging.py
    reduce     sum over the ranks, one collective; never captured
    update     norm, clipping, gate, optimizer, loss scale, learning rate; writes the metrics of the step

`train`, `update` and the forward of an evaluation read and write tensors whose addresses never change.

A non-finite step must not reach the weights, and the host must not have to ask. So:
- the device gates the update by `found_inf`, set from the gradient norm (already reduced: the same on all ranks);
- the first non-finite loss or gradient raises a flag that turns every later loss into NaN. That closes the gate on all
  ranks until the host reads the metrics and stops: the weights are those of the last good step.
fp16 differs: an overflowing gradient is ordinary there. It skips the update, halves the scale and holds the schedule,
all on the device. Other optimizers than torch's fused AdamW have no gate and take the learning rate from the host,
which waits for both.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from launcher.compile.graphs import Graphs, Work
from launcher.compile.plan import Plan
from launcher.data.loader import StepBatch
from launcher.data.pack.micro_batch import MicroBatch
from launcher.model.lora_start import start_parameters
from launcher.model.packed import PackedCausalLM
from launcher.recipe.train_section import TrainSection
from launcher.runtime.progress import PROGRESS
from launcher.train.gradients import FlatGradients
from launcher.train.loss_scale import LossScale
from launcher.train.optim import Rates, capturable, gates_on_device, init_state, make_optimizer
from launcher.train.schedule_free import counters_of
from launcher.train.staging import Staging


@dataclass(frozen=True)
class StepResult:
    """The metrics of one step on the device, fp64 [5]; reading them waits for the device."""

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

    @property
    def stop_votes(self) -> Tensor:
        """The sum of all ranks' `TrainStep.stop_vote`."""
        return self.metrics[4]


@dataclass
class Calls:
    """The work on a micro batch of one shape, once it is in `staging`; each says whether it ran compiled."""

    staging: Staging
    train: Callable[[], bool]
    evaluate: Callable[[], bool]


class TrainStep:
    """The training step of `model`: owns its gradients, optimizer, learning rates over `steps`, and fp16 loss scale."""

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
        device = self.device = accelerator.device
        self.model = model
        self.plan = plan
        self.steps_done = 0
        self.stop_vote = 0.0  # this rank's; it travels with the gradients, so that all ranks stop at one step
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients = FlatGradients(self.parameters)
        self._rates = Rates(train, steps=steps, device=device)
        self.optimizer = make_optimizer(model, train, lr=self._rates.lr)
        self.scaler = LossScale(device, enabled=fp16)
        self._clip = train.clip
        self._nan = torch.full((), float("nan"), device=device)
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._found_inf = torch.zeros((), device=device)
        self._metrics = torch.zeros(5, dtype=torch.float64, device=device)
        self._eval_loss = torch.zeros((), device=device)
        if gates_on_device(self.optimizer):
            self.optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]
        self._calls: dict[tuple[torch.Size, ...], Calls] = {}
        self._update: Work = self._run_update
        self._live_state: dict[str, Any] = {}

    def __call__(self, batch: StepBatch) -> StepResult:
        """Run the step. Never waits for the device, except with an optimizer without a gate. Raises ContractError
        (strict) for a compile error."""
        self.plan.call(self.accumulate, batch)
        self._update()
        self.steps_done += 1
        return StepResult(self._metrics.clone())

    def accumulate(self, batch: StepBatch) -> Tensor:
        """Compute the gradients of the step batch over all ranks, times the loss scale, into `.grad`; returns its
        summed loss, fp32 scalar. The next step overwrites both."""
        self._gradients.clear()
        factor = 1 / max(1, batch.supervised_tokens)
        compiled = [self._loaded(micro, factor=factor).train() for micro in batch.micro_batches]
        self.plan.observer.passes["step", all(compiled)] += 1
        if self.stop_vote:
            self._gradients.stop_votes.fill_(self.stop_vote)
        self._gradients.reduce()
        return self._gradients.loss_sum

    def eval_loss(self, micro: MicroBatch) -> Tensor:
        """This rank's summed loss of one micro batch, without gradients, fp32 scalar; the next call overwrites it."""
        self.plan.observer.passes["evaluation", self._loaded(micro).evaluate()] += 1
        return self._eval_loss

    def rehearse(self, samples: Sequence[MicroBatch]) -> None:
        """Train and evaluate once with each of `samples`; leaves compiled code and changes nothing else."""
        with self._gate_closed():
            for sample in samples:
                calls = self._loaded(sample)
                calls.train()
                calls.evaluate()

    def capture(self, samples: Sequence[MicroBatch]) -> Work:
        """Capture the calls for the shapes of `samples` (largest first), and the update, in CUDA graphs; returns the
        function that puts the graphs in their place.

        Changes neither weights nor optimizer nor loss scale; draws random numbers where there is dropout. Raises
        CaptureFailed, after which training can go on uncaptured, and ContractError for a compilation.
        """
        graphs = Graphs(self.device)
        calls = [self._loaded(sample) for sample in samples]
        update = [self._run_update] if gates_on_device(self.optimizer) else []
        work = [*(one for call in calls for one in (call.train, call.evaluate)), *update]

        def all_work() -> None:
            for one in work:
                one()

        with self._gate_closed():
            graphs.rehearse(lambda: self.plan.call(all_work))
            with capturable(self.optimizer):
                replays = graphs.capture(work)

        def install() -> None:
            for call, train, evaluate in zip(calls, replays[::2], replays[1::2], strict=False):
                call.train, call.evaluate = train, evaluate
            if update:
                self._update = replays[-1]

        return install

    def live_state(self) -> dict[str, Any]:
        """Everything that a step leaves for the next one, by name: the very tensors that training, captured or not,
        reads and writes. Optimizer state that the first step would make is made now."""
        if not self._live_state:
            init_state(self.optimizer)
            named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            starts = {name: parameter.detach() for name, parameter in start_parameters(self.model).items()}
            self._live_state = {
                "adapters": {name: parameter.detach() for name, parameter in named},
                **({"start": starts} if starts else {}),  # frozen: another device would compute it otherwise
                "optimizer": {name: self.optimizer.state[parameter] for name, parameter in named},
                "rates": {"updates": self._rates.updates},
                "loss_scale": {"value": self.scaler.value, "good_steps": self.scaler.good_steps},
                "non_finite": self._bad,
            }
        if counters := counters_of(self.optimizer):  # numbers, not tensors: read anew each time
            self._live_state["averages"] = counters
        return self._live_state

    @contextmanager
    def _gate_closed(self) -> Iterator[None]:
        """Inside, updates change nothing; the optimizer's state may be made, and stays zero."""
        scale, good_steps = self.scaler.value.clone(), self.scaler.good_steps.clone()
        self._bad.fill_(True)
        try:
            yield
        finally:
            self._bad.fill_(False)
            self.scaler.value.copy_(scale)
            self.scaler.good_steps.copy_(good_steps)
            self._gradients.clear()

    def _check_bounds(self, micro: MicroBatch) -> None:
        """Assert what the compiled model relies on: at most so many targets, and so many tokens of a document."""
        max_targets = self.model.loss_rows(micro.labels.numel())
        # The loss sees it too, but only on the device and as a NaN.
        assert micro.supervised_tokens <= max_targets, (
            f"{micro.supervised_tokens} targets where the data has at most {max_targets}"
        )
        longest, max_seqlen = int(micro.cu_seqlens.diff().max()), self.model.max_seqlen
        assert longest <= max_seqlen, f"a document of {longest} tokens, where max_seqlen of attention is {max_seqlen}"

    def _loaded(self, micro: MicroBatch, *, factor: float = 0.0) -> Calls:
        """Send `micro` to the device; returns the calls for its shape."""
        self._check_bounds(micro)
        PROGRESS.begin_micro_batch()
        fields = arguments(micro)
        shape = tuple(field.shape for field in fields)
        if shape not in self._calls:
            staging, tokens = Staging(fields, self.device), micro.labels.numel()
            self._calls[shape] = Calls(
                staging,
                self.plan.checked(lambda: self._train(staging), tokens=tokens, train=True),
                self.plan.checked(lambda: self._evaluate(staging), tokens=tokens, train=False),
            )
        calls = self._calls[shape]
        calls.staging.fill(fields, factor=factor)
        return calls

    def _train(self, staging: Staging) -> None:
        loss = self.model(*staging.inputs())
        value = loss.detach()
        factor = torch.where(self._bad | ~torch.isfinite(value), self._nan, staging.factor * self.scaler.value)
        # Not backward(): it would launch one kernel for each parameter's gradient.
        self._gradients.add(torch.autograd.grad(loss, self.parameters, grad_outputs=factor), value)

    @torch.no_grad()
    def _evaluate(self, staging: Staging) -> None:
        self._eval_loss.copy_(self.model(*staging.inputs()))

    @torch.no_grad()
    def _run_update(self) -> None:
        """Apply the update if it is finite; the device decides."""
        loss, norm = self._gradients.loss_sum, self._gradients.norm() / self.scaler.value
        overflow = ~torch.isfinite(norm)
        fp16 = self.scaler.is_enabled()
        # In fp16 an overflowing gradient is ordinary, a non-finite loss is not. A non-finite loss of one rank makes the
        # loss and norm of every rank non-finite.
        self._bad |= ~torch.isfinite(loss) if fp16 else overflow
        blocked = self._bad | overflow
        self._found_inf.copy_(blocked)
        lr = self._rates.load()
        skipped = overflow if fp16 else torch.zeros_like(overflow)
        votes = self._gradients.stop_votes
        self._metrics.copy_(torch.stack([loss.double(), norm.double(), lr, skipped.double(), votes.double()]))
        self._scale_and_clip(norm)
        self._step_optimizer()
        self.scaler.follow(overflow.float())
        self._rates.advance(~blocked)

    def _scale_and_clip(self, norm: Tensor) -> None:
        """Multiply by one factor for both: 1 / loss scale, and clip / norm where the norm is larger than clip
        (the rule of torch.nn.utils.clip_grad_norm_, its 1e-6 included)."""
        if self._clip is None and not self.scaler.is_enabled():
            return
        shrink = torch.ones_like(norm) if self._clip is None else (self._clip / (norm + 1e-6)).clamp(max=1.0)
        self._gradients.multiply(shrink / self.scaler.value)

    def _step_optimizer(self) -> None:
        if gates_on_device(self.optimizer):
            for group in self.optimizer.param_groups:
                if "rate_factor" in group:  # else the optimizer reads the schedule's own tensor
                    group["lr"].copy_(self._rates.lr * group["rate_factor"])
            self.optimizer.step()
        elif not bool(self._found_inf):  # waits for the device: only fused optimizers have a gate
            for group in self.optimizer.param_groups:
                group["lr"] = float(self._rates.lr) * group.get("rate_factor", 1.0)
            self.optimizer.step()


def arguments(micro: MicroBatch) -> tuple[Tensor, ...]:
    """A micro batch in the order of PackedCausalLM.forward."""
    return micro.input_ids, micro.labels, micro.position_ids, micro.document_ids, micro.cu_seqlens
