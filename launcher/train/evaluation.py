"""Evaluations: the loss of the validation blocks, and what the model answers to a few validation prompts."""

import math
from collections.abc import Generator, Iterator
from functools import partial

import torch

from launcher.errors import NonFiniteError
from launcher.records.run import BadBatch, EvalRecord, EvalSamples
from launcher.runtime.progress import PROGRESS
from launcher.runtime.signals import is_deferring, stop_vote
from launcher.train.history import RunHistory, bad_batch
from launcher.train.sample import generate
from launcher.train.schedule_free import averages_in_place
from launcher.train.setup import Worker


def evaluate(
    worker: Worker, history: RunHistory, *, step: int
) -> Generator[EvalRecord | EvalSamples | BadBatch, None, float]:
    """Evaluate where there are validation blocks. Returns the sum of the ranks' votes to stop: with any it was cut
    short and yields nothing, and the run that goes on evaluates first.

    Raises NonFiniteError, after the batch in which the loss is not finite on this rank."""
    if not worker.eval_batches:
        return 0.0
    with averages_in_place(worker.step.optimizer):
        return (yield from _evaluate(worker, history, step=step))


def _evaluate(
    worker: Worker, history: RunHistory, *, step: int
) -> Generator[EvalRecord | EvalSamples | BadBatch, None, float]:
    loss, votes = eval_loss_and_votes(worker)
    if votes:
        return votes
    record = EvalRecord(step, loss)
    if not math.isfinite(record.eval_loss):
        yield from _non_finite_batch(worker, step)
        raise NonFiniteError(f"eval loss must be finite; after step {step} it is {record.eval_loss}.", step=step)
    history.evals.append(record)
    worker.state.early_stop.update(record.eval_loss)
    yield record
    if worker.rank_info.is_main and (examples := worker.prepared.data.examples[: worker.recipe.run.eval_samples]):
        with worker.clock.phase("sample"):
            generated = partial(
                generate,
                worker.built.packed,
                worker.prepared.tokenizer,
                tokens=worker.recipe.run.sample_tokens,
                max_length=worker.recipe.data.max_length,
                stop_ids=worker.prepared.stop_ids,
            )
            samples = tuple(generated(example) for example in examples if not stop_vote())
        yield EvalSamples(step, samples)
    return 0.0


def eval_loss(worker: Worker) -> float:
    """The mean loss over the supervised tokens of all validation blocks, the same on every rank."""
    return eval_loss_and_votes(worker)[0]


def eval_loss_and_votes(worker: Worker) -> tuple[float, float]:
    """`eval_loss`, and the votes to stop of the ranks that broke off: an evaluation may take longer than the launcher
    waits before it kills."""
    with worker.clock.phase("evaluate"), torch.no_grad():
        sums = torch.zeros(3, dtype=torch.float64, device=worker.accelerator.device)
        for batch in worker.eval_batches or ():
            if is_deferring() and stop_vote():
                sums[2] = stop_vote()
                break
            sums[0] += worker.plan.call(worker.step.eval_loss, batch)
            sums[1] += batch.supervised_tokens
        PROGRESS.enter_collective()
        total, supervised, votes = worker.accelerator.reduce(sums, reduction="sum").tolist()
    return total / max(1.0, supervised), votes


def _non_finite_batch(worker: Worker, step: int) -> Iterator[BadBatch]:
    for batch in worker.eval_batches or ():
        if not math.isfinite(float(worker.plan.call(worker.step.eval_loss, batch))):
            yield bad_batch(worker, [batch], step=step)
            return
