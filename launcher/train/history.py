"""What a run has done: the records of its steps and evaluations, made from the metrics as they are read.

A spike is a step whose gradient norm is more than 10 times the median of the 50 usual steps before it, or whose loss is
more than 2 nats above theirs. Clipping bounds its update; train.spike_patience ends a run that does not recover.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from launcher.checkpoint.resume import Resumed
from launcher.data.pack.micro_batch import IGNORE, MicroBatch
from launcher.errors import DivergedError, NonFiniteError
from launcher.records.run import BadBatch, BatchDocument, EvalRecord, StepRecord
from launcher.train.metrics import StepMetrics
from launcher.train.setup import Worker

SKIPS_IN_A_ROW = 20  # fp16: a scale that halves this often without one good step will not recover
USUAL_STEPS, LEAST_USUAL_STEPS = 50, 10  # before a step, that tell what is usual; with fewer nothing is a spike
SPIKE_RATIO, SPIKE_NATS = 10.0, 2.0  # of the gradient norm to the usual; of the loss above the usual
BATCHES_KEPT = 5  # of spikes, in bad_batches/


@dataclass
class RunHistory:
    """What the run has done so far, filled as it goes: also for whoever reports a failure."""

    steps: list[StepRecord] = field(default_factory=list)  # those of earlier parts of the run too
    evals: list[EvalRecord] = field(default_factory=list)
    rank_tokens: list[tuple[int, int]] = field(default_factory=list)  # this rank's (all, supervised), by step
    worker: Worker | None = None
    last_step: int = 0
    skipped_in_a_row: int = 0
    spikes_in_a_row: int = 0
    restored_eval_loss: float | None = None  # of the best checkpoint's adapter, once it is given back
    first_read: int = 0  # steps of this part that were read together with the first one

    def go_on(self, resumed: Resumed) -> None:
        """Take over the records of the run's earlier parts."""
        self.steps = [record for record in resumed.records if isinstance(record, StepRecord)]
        self.evals = [record for record in resumed.records if isinstance(record, EvalRecord)]
        self.last_step = resumed.step
        self.skipped_in_a_row = len(list(takewhile(lambda step: step.skipped, reversed(self.steps))))
        self.spikes_in_a_row = len(list(takewhile(lambda step: step.spike, reversed(self.steps))))

    def give_back_folder(self) -> None:
        """Let other runs take the run folder, if this one has come so far as to have one."""
        if self.worker is not None:
            self.worker.folder.unlock()

    @property
    def eval_losses(self) -> dict[int, float]:
        """By step."""
        return {record.step: record.eval_loss for record in self.evals}

    @property
    def last_eval_is_best(self) -> bool:
        """Whether the last evaluation after a step has the lowest loss of them; the one before training has no
        checkpoint."""
        losses = [record.eval_loss for record in self.evals if record.step]
        return bool(losses) and losses[-1] < min(losses[:-1], default=math.inf)

    def is_spike(self, loss: float, grad_norm: float) -> bool:
        """Whether these figures of the next step are far above the usual."""
        usual = [s for s in self.steps[-2 * USUAL_STEPS :] if not (s.spike or s.skipped)][-USUAL_STEPS:]
        if len(usual) < LEAST_USUAL_STEPS:
            return False
        usual_norm, usual_loss = (statistics.median(getattr(s, name) for s in usual) for name in ("grad_norm", "loss"))
        return grad_norm > SPIKE_RATIO * usual_norm or loss > usual_loss + SPIKE_NATS

    def lacks_evaluation(self, *, every: int | None, last: int) -> bool:
        """Whether a signal cut the evaluation after the newest step short. `every`: train.eval_every."""
        step = self.last_step
        due = step == last or bool(every and step % every == 0)
        recorded = bool(self.steps) and self.steps[-1].step == step  # else the metrics of an earlier part are lost
        return due and recorded and all(evaluation.step != step for evaluation in self.evals)

    @property
    def ledger(self) -> str:
        """What holds memory, by phase."""
        return self.worker.ledger.as_text() if self.worker else "nothing yet"

    @property
    def steady(self) -> tuple[list[float], list[tuple[int, int]]]:
        """Seconds and this rank's tokens of all steps of this part but the first, which warms allocators and libraries,
        and those that were read together with it (train.log_every); of all where there are no others."""
        count = len(self.rank_tokens)
        steady = count - self.first_read if count > self.first_read else count
        start = count - steady
        return [step.step_s for step in self.steps[len(self.steps) - steady :]], self.rank_tokens[start:]


def step_records(
    worker: Worker, history: RunHistory, readings: Sequence[StepMetrics]
) -> Iterator[StepRecord | BadBatch]:
    """The record of each step that was read, and the batch of one that went wrong.

    Raises NonFiniteError naming the first step whose loss or gradient is not finite, after the records before it, and
    DivergedError after train.spike_patience spikes in a row.
    """
    history.first_read = history.first_read or len(readings)
    for reading in readings:
        record = _record(worker, history, reading)
        history.skipped_in_a_row = history.skipped_in_a_row + 1 if record.skipped else 0
        history.spikes_in_a_row = history.spikes_in_a_row + 1 if record.spike else 0
        fault = _not_finite(record, history.skipped_in_a_row)
        if fault or (record.spike and sum(step.spike for step in history.steps) < BATCHES_KEPT):
            yield bad_batch(worker, reading.batch.micro_batches, step=record.step)
        if fault:
            raise fault
        history.steps.append(record)
        history.last_step = record.step
        micro_batches = reading.batch.micro_batches
        history.rank_tokens.append(
            (sum(m.tokens for m in micro_batches), sum(m.supervised_tokens for m in micro_batches))
        )
        yield record
        _check_spikes(history.spikes_in_a_row, record, patience=worker.recipe.train.spike_patience)


def _record(worker: Worker, history: RunHistory, reading: StepMetrics) -> StepRecord:
    batch = reading.batch
    loss = reading.loss_sum / max(1, batch.supervised_tokens)
    return StepRecord(
        step=history.last_step + 1,
        loss=loss,
        lr=reading.lr,
        grad_norm=reading.grad_norm,
        tokens=batch.tokens,
        supervised_tokens=batch.supervised_tokens,
        step_s=reading.step_s,
        vram_mib=worker.ledger.used_mib(),
        skipped=reading.skipped,
        spike=not reading.skipped and history.is_spike(loss, reading.grad_norm),
    )


def _not_finite(record: StepRecord, skipped_in_a_row: int) -> NonFiniteError | None:
    if math.isfinite(record.loss) and (math.isfinite(record.grad_norm) or record.skipped):
        if skipped_in_a_row < SKIPS_IN_A_ROW:
            return None
        what = f"{skipped_in_a_row} fp16 steps in a row overflowed"
    else:
        what = f"loss {record.loss}, gradient norm {record.grad_norm}"
    return NonFiniteError(
        f"loss and gradients must be finite; step {record.step} has {what}. Its update was not applied.\n"
        f"Its tokens and text are in bad_batches/step-{record.step}-rank-*.jsonl of the run folder. Look at them; "
        "start a new run with a lower train.lr, or with model.dtype=bfloat16 or float32.",
        step=record.step,
    )


def _check_spikes(in_a_row: int, record: StepRecord, *, patience: int | None) -> None:
    if patience is not None and in_a_row >= patience:
        raise DivergedError(
            f"no more than train.spike_patience={patience} steps in a row may spike; step {record.step} is number "
            f"{in_a_row}: loss {record.loss:.4g}, gradient norm {record.grad_norm:.4g}.\n"
            "Look at bad_batches/ in the run folder; start a new run with a lower train.lr, or go on from a checkpoint "
            "before the spikes with run.resume=…/checkpoints/step-N and more patience.",
            step=record.step,
        )


def bad_batch(worker: Worker, micro_batches: Sequence[MicroBatch], *, step: int) -> BadBatch:
    """The documents of these micro batches, as this rank was given them."""
    documents = []
    for number, micro in enumerate(micro_batches):
        for block, row in enumerate(micro.document_ids):
            for document in row.unique().tolist():
                where = row == document
                ids, labels = micro.input_ids[block][where].tolist(), micro.labels[block][where].tolist()
                if any(label != IGNORE for label in labels):  # padding has none
                    text = worker.prepared.tokenizer.decode(ids)
                    documents.append(BatchDocument(number, block, ids, labels, text))
    return BadBatch(step, worker.rank_info.rank, tuple(documents))
