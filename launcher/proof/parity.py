"""Runs the same batches through three models, one after the other, and compares.

    compiled     what training uses: Worker.build, Worker.compile (warm-up, capture), TrainStep.accumulate
    eager        stock transformers, PEFT and bitsandbytes modules, autocast where the dtype is a half one
    reference    the same stock modules in fp32, on the dequantised base

The weights are never updated: each batch is one measurement, and all batches are measured at the same weights, so that
a difference of one batch does not reach the next. LoRA B is drawn first, with a seed: at zero, where training begins,
every gradient of A is exactly 0 and has no direction. The three have the same adapters and no LoRA dropout. Each model
is freed before the next is built; losses and gradients stay, on the CPU: two models' gradients of all batches at most.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch._dynamo
from peft import PeftModel
from torch import Tensor, nn

from launcher.data.loader import StepBatch
from launcher.data.pack.micro_batch import IGNORE
from launcher.errors import NonFiniteError
from launcher.proof.gate import Comparison, Measured, gate_of
from launcher.proof.stock import grouped, stock_loss, stock_model, supervised_documents
from launcher.records.parity import ParityRecord
from launcher.records.run import CompileRecord, StartRecord, Verdict
from launcher.runtime.clock import Clock
from launcher.train.describe import start_record
from launcher.train.loss_scale import LossScale
from launcher.train.request import Request
from launcher.train.setup import Prepared, Worker, prepare_inputs

B_STD = 0.02  # of the drawn LoRA B: as large as a base weight, the update a few percent of the base's output
POSITIONS = 4096  # that a stock model sees at once, but for a longer document: it makes all their logits, in fp32
HALVINGS = 20  # of the fp16 loss scale, at most: from 65,536 to below 1

Adapters = dict[str, Tensor]


def parity(request: Request) -> Iterator[str | ParityRecord]:
    """Measure `proof.parity` batches; yields the names of phases and, last, the record. Writes nothing but caches.

    Raises the errors of launcher/errors.py; that the gate is closed is said by the record, not raised.
    """
    clock, (request, notes) = Clock(), without_dropout(request)
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
    start, compile, dtype = _start(worker), worker.observer.record(), worker.built.dtype
    release(worker)
    del worker
    yield f"eager model: {len(batches)} batches"
    with clock.phase("eager"):
        eager = list(measure_stock(request, prepared, batches, dtype=dtype, adapters=adapters))
    free(prepared.device)
    yield f"fp32 reference: {len(batches)} batches"
    comparison = Comparison()
    with clock.phase("reference"):
        true = measure_stock(request, prepared, batches, dtype=dtype, adapters=adapters, reference=True)
        for batch, *three in zip(batches, compiled, eager, true, strict=True):
            comparison.add(*three, supervised_tokens=batch.supervised_tokens)
    free(prepared.device)
    gate = gate_of(dtype)
    yield ParityRecord(
        recipe=recipe.model_dump(mode="json"),
        start=start,
        compile=compile,
        gate=gate,
        batches=tuple(comparison.batches),
        adapters=comparison.adapters,
        loss_error=comparison.loss_error,
        gradient_error=comparison.gradient_error,
        verdicts=(*comparison.verdicts(gate), *_uncompiled(compile)),
        elapsed_s=clock.elapsed_s,
        notes=(*notes, *_notes(request, len(batches), gate.loss_batches), *compile.fallbacks),
    )


def without_dropout(request: Request) -> tuple[Request, tuple[str, ...]]:
    """The request with lora.dropout=0, and a note where it asked for more: masks cannot be alike in three models."""
    lora = request.recipe.lora
    if not lora.dropout:
        return request, ()
    recipe = request.recipe.model_copy(update={"lora": lora.model_copy(update={"dropout": 0.0})})
    return replace(request, recipe=recipe), (f"measured with lora.dropout=0, not the recipe's {lora.dropout:g}",)


def compiled_worker(request: Request, prepared: Prepared, *, clock: Clock) -> Worker:
    """Past warm-up and armed, as at the first training step; without a run folder."""
    worker = Worker(request, prepared, clock=clock)
    worker.build()
    worker.compile()
    return worker


def perturb(model: PeftModel, *, seed: int) -> Adapters:
    """Draw LoRA B of `model` from `seed`; returns a copy of all its adapters, by name, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainable(model):
            if ".lora_B." in name:
                drawn = torch.empty(parameter.shape).normal_(std=B_STD, generator=generator)
                parameter.copy_(drawn)
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in trainable(model)}


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def measure_compiled(worker: Worker, batches: Sequence[StepBatch]) -> list[Measured]:
    """Each batch as the training step does it, but for the update. Raises ContractError (strict) for a compilation."""
    found = []
    for batch in batches:
        found.append(
            _measured(
                lambda batch=batch: worker.plan.call(worker.step.accumulate, batch),  # type: ignore[misc]
                worker.built.peft,
                worker.step.scaler,
                supervised_tokens=batch.supervised_tokens,
            )
        )
    worker.plan.check()
    return found


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
    model = stock_model(recipe, request.source, prepared.config, dtype=dtype, device=device, reference=reference)
    parameters = dict(trainable(model))
    assert parameters.keys() == adapters.keys(), "the models have the same adapters"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(adapters[name])
    compute = torch.float32 if reference else dtype
    scaler = torch.amp.GradScaler(device.type, enabled=compute == torch.float16)

    def accumulate(batch: StepBatch, supervised: int) -> Tensor:
        model.zero_grad()
        total = torch.zeros((), device=device)
        for micro in batch.micro_batches:
            micro = micro.to(device)
            documents = supervised_documents(micro.input_ids, micro.labels, micro.document_ids)
            for group in grouped(documents, positions=min(micro.input_ids.numel(), POSITIONS)):
                loss = stock_loss(model, group, dtype=compute)
                total += loss.detach()
                scaler.scale(loss / max(1, supervised)).backward()
        return total

    for batch in batches:
        # Counted here and not taken from the batch: a wrong count would scale all three alike.
        n = sum(int((micro.labels != IGNORE).sum()) for micro in batch.micro_batches)
        yield _measured(lambda batch=batch, n=n: accumulate(batch, n), model, scaler, supervised_tokens=n)  # type: ignore[misc]


def _measured(
    accumulate: Callable[[], Tensor],
    model: nn.Module,
    scaler: torch.amp.GradScaler | LossScale,
    *,
    supervised_tokens: int,
) -> Measured:
    """Loss and gradients of `accumulate`, which fills `.grad` anew. fp16: repeated with half the scale while gradients
    overflow, as training skips such steps; the scale then stays."""
    for _ in range(HALVINGS):
        loss = float(accumulate()) / max(1, supervised_tokens)
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
    """Disarm the compile contract and let go of everything that Accelerate and dynamo hold of the worker's model."""
    device = worker.accelerator.device
    worker.plan.release()
    worker.accelerator.free_memory()
    for holder in (worker, worker.plan):
        vars(holder).clear()
    torch._dynamo.reset()
    free(device)


def free(device: torch.device) -> None:
    """Collect what nothing refers to any more, and give the device's memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _start(worker: Worker) -> StartRecord:
    """The start record of the run that is not made: no folder, and as many steps as batches are measured."""
    return replace(start_record(worker), run_dir="", steps=worker.recipe.proof.parity)


def _uncompiled(compile: CompileRecord) -> tuple[Verdict, ...]:
    """A verdict that fails where compile.mode=warn fell back: what was compared is not what the recipe asks for."""
    if not compile.fallbacks:
        return ()
    return (Verdict("the compiled model is compiled", False, compile.fallbacks[0]),)


def _notes(request: Request, batches: int, needed: int) -> tuple[Any, ...]:
    found = []
    if batches < needed:
        found.append(f"the mean loss error is not judged: {batches} batches scatter too much, {needed} are needed")
    if request.recipe.compile.mode == "off":
        found.append("compile.mode=off: the compiled column is the same path, uncompiled")
    return tuple(found)
