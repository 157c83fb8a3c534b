"""Runs the same batches through three models, one after the other, and compares.

    compiled     what training uses: Worker.build, Worker.compile (warm-up, capture), TrainStep.accumulate
    eager        stock transformers, PEFT and bitsandbytes modules, autocast in half precision
    reference    the same stock modules in fp32, on the dequantised base

The weights are never updated, so a difference in one batch does not reach the next: each batch is one measurement. LoRA
B is moved by a draw first: at zero, where training begins, every gradient of A is exactly 0 and has no direction. The
rows of trained tokens, which begin as the base's, are moved too. The three models have the same adapters and no LoRA
dropout. Each model is freed before the next is built; losses and gradients stay on the CPU, those of all batches for
two models at most.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch._dynamo
from peft import PeftModel
from torch import Tensor, nn

from launcher.checkpoint.adapter import saved_parameters
from launcher.data.loader import StepBatch
from launcher.errors import NonFiniteError
from launcher.proof.gate import Comparison, Measured, gate_of
from launcher.proof.noise import DROPOUT, NEFTUNE, without_noise
from launcher.proof.stock import (
    Adapters,
    PaddedBatch,
    accumulate,
    collate,
    draw_adapters,
    stock_model,
    trainable,
    write_adapters,
)
from launcher.records.parity import ParityRecord
from launcher.runtime.clock import Clock
from launcher.train.describe import start_record
from launcher.train.inputs import Prepared, prepare_inputs
from launcher.train.loss_scale import LossScale
from launcher.train.request import Request
from launcher.train.setup import Worker
from launcher.train.verdicts import steps_verdict

MAX_POSITIONS = 4096  # of a stock model's forward pass, which makes fp32 logits of all of them
MAX_HALVINGS = 20  # of the fp16 loss scale: from 65,536 to below 1


def parity(request: Request) -> Iterator[str | ParityRecord]:
    """Measure `proof.parity` batches; yields the names of phases and, last, the record. Writes nothing but caches.

    Raises the errors of launcher/errors.py, but not for a closed gate: that is in the record's verdicts.
    """
    clock, (request, notes) = Clock(), without_noise(request, DROPOUT, NEFTUNE)
    recipe = request.recipe
    yield "reading data"
    with clock.phase("data"):
        prepared = prepare_inputs(request)
    yield "compiled model: loading and compiling"
    with clock.phase("compile"):
        worker = compiled_worker(request, prepared, clock=clock)
        adapters = perturb(worker.built.peft, seed=recipe.train.seed)
        batches = [next(worker.batches) for _ in range(recipe.proof.parity)]
    yield f"compiled model: {len(batches)} batches"
    with clock.phase("compiled"):
        compiled = measure_compiled(worker, batches)
    # The start record of a run of as many steps as batches, without a folder.
    start = replace(start_record(worker), run_dir="", steps=len(batches))
    compile, dtype, loaded = worker.observer.record(), worker.built.dtype, worker.built.loaded
    release(worker)
    del worker
    stock = partial(measure_stock, request, prepared, batches, dtype=dtype, adapters=adapters)
    yield f"eager model: {len(batches)} batches"
    with clock.phase("eager"):
        eager = list(stock())
    free(prepared.device)
    yield f"fp32 reference: {len(batches)} batches"
    comparison = Comparison()
    with clock.phase("reference"):
        for batch, *measured in zip(batches, compiled, eager, stock(reference=True), strict=True):
            comparison.add(*measured, supervised_tokens=batch.supervised_tokens)
    free(prepared.device)
    gate = gate_of(dtype)
    verdicts = (*loaded, *comparison.verdicts(gate))
    if recipe.compile.mode != "off":
        verdicts += (steps_verdict([compile]),)
    yield ParityRecord(
        recipe=recipe.model_dump(mode="json"),
        start=start,
        compile=compile,
        gate=gate,
        batches=comparison.judged_batches(gate),
        adapters=comparison.adapters(gate),
        lengths=comparison.lengths(gate),
        loss_error=comparison.loss_error,
        gradient_error=comparison.gradient_error,
        verdicts=verdicts,
        elapsed_s=clock.elapsed_s,
        notes=(*notes, *_notes(request, len(batches), gate.loss_batches), *compile.fallbacks),
    )


def compiled_worker(request: Request, prepared: Prepared, *, clock: Clock) -> Worker:
    """A worker past warm-up, as at the first training step, but without a run folder."""
    worker = Worker(request, prepared, clock=clock)
    worker.build()
    worker.compile()
    return worker


def perturb(model: PeftModel, *, seed: int) -> Adapters:
    """Move LoRA B and the rows of trained tokens of `model` by a draw from `seed`; returns a copy of all adapters, by
    name, on the CPU: the frozen ones of a start too."""
    draw_adapters(model, seed=seed)
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in saved_parameters(model).items()}


def measure_compiled(worker: Worker, batches: Sequence[StepBatch]) -> list[Measured]:
    """Run each batch as a training step does, without the update. Raises ContractError (strict) for a compilation."""
    measured = []
    for batch in batches:
        run = partial(worker.plan.call, worker.step.accumulate, batch)
        tokens = batch.supervised_tokens
        measured.append(_measure(run, worker.built.peft, worker.step.scaler, supervised_tokens=tokens))
    worker.plan.check()
    return measured


def measure_stock(
    request: Request,
    prepared: Prepared,
    batches: Sequence[StepBatch],
    *,
    dtype: torch.dtype,
    adapters: Adapters,
    reference: bool = False,
) -> Iterator[Measured]:
    """Build the stock model for a run in `dtype` (`reference`: its fp32 reference), then measure batch by batch."""
    device, recipe = prepared.device, request.recipe
    how: Any = {"dtype": dtype, "device": device, "reference": reference, "token_ids": prepared.token_ids}
    model = stock_model(recipe, request.source, prepared.config, **how)
    write_adapters(model, adapters)
    compute = torch.float32 if reference else dtype
    scaler = torch.amp.GradScaler(device.type, enabled=compute == torch.float16)

    def run(padded: PaddedBatch) -> Tensor:
        model.zero_grad()
        return accumulate(model, padded, scaler, dtype=compute)

    for batch in batches:
        padded = collate(batch, max_positions=MAX_POSITIONS)
        yield _measure(partial(run, padded), model, scaler, supervised_tokens=padded.supervised_tokens)


def _measure(
    run: Callable[[], Tensor], model: nn.Module, scaler: torch.amp.GradScaler | LossScale, *, supervised_tokens: int
) -> Measured:
    """Loss and gradients after `run`, which sets every `.grad` anew and returns the summed loss.

    fp16: repeated with half the loss scale, which then stays, while gradients overflow; training skips such steps.
    """
    for _ in range(MAX_HALVINGS):
        loss = float(run()) / max(1, supervised_tokens)
        scale = scaler.get_scale()
        gradients = {name: _gradient(parameter, scale) for name, parameter in trainable(model)}
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
        if finite and math.isfinite(loss):
            return Measured(loss, gradients)
        if finite or not scaler.is_enabled() or not math.isfinite(loss):
            break
        scaler.update(scale / 2)
    raise NonFiniteError(
        f"losses and gradients must be finite to be compared; here the loss is {loss} and gradients are "
        f"{'finite' if finite else 'not'}.\nUse model.dtype=bfloat16 or float32, or look at the model's weights."
    )


def _gradient(parameter: nn.Parameter, scale: float) -> Tensor:
    if parameter.grad is None:  # no document of the batch has a target
        return torch.zeros(parameter.shape)
    return parameter.grad.detach().to("cpu", torch.float32, copy=True).div_(scale)


def release(worker: Worker) -> None:
    """Disarm the compile contract and free the worker's model, which Accelerate and dynamo hold too."""
    device = worker.accelerator.device
    worker.release()
    worker.accelerator.free_memory()
    for holder in (worker, worker.plan):
        vars(holder).clear()
    torch._dynamo.reset()
    free(device)


def free(device: torch.device) -> None:
    """Collect garbage and return cached memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _notes(request: Request, batches: int, min_batches: int) -> list[str]:
    notes = []
    if batches < min_batches:
        notes.append(f"the mean loss error is not judged: {batches} batches scatter too much, {min_batches} are needed")
    if request.recipe.compile.mode == "off":
        notes.append("compile.mode=off: the compiled column is the same path, uncompiled")
    return notes
