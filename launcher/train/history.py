"""What a run has done: the records of its steps and evaluations, made from the metrics as they are read."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from launcher.checkpoint.resume import Resumed
from launcher.errors import NonFiniteError
from launcher.records.run import EvalRecord, StepRecord
from launcher.train.metrics import StepMetrics
from launcher.train.setup import Worker

SKIPS_IN_A_ROW = 20  # fp16: a scale that halves this often without one good step will not recover


@dataclass
class RunHistory:
    """What the run has done so far, filled as it goes: also for whoever reports a failure."""

    steps: list[StepRecord] = field(default_factory=list)  # those of earlier parts of the run too
    evals: list[EvalRecord] = field(default_factory=list)
    rank_tokens: list[tuple[int, int]] = field(default_factory=list)  # this rank's (all, supervised), by step
    worker: Worker | None = None
    last_step: int = 0
    skipped_in_a_row: int = 0
    first_read: int = 0  # steps of this part that were read together with the first one

    def go_on(self, resumed: Resumed) -> None:
        """Take over the records of the run's earlier parts."""
        self.steps = [record for record in resumed.records if isinstance(record, StepRecord)]
        self.evals = [record for record in resumed.records if isinstance(record, EvalRecord)]
        self.last_step = resumed.step
        self.skipped_in_a_row = len(list(takewhile(lambda step: step.skipped, reversed(self.steps))))

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


def step_records(worker: Worker, history: RunHistory, readings: Sequence[StepMetrics]) -> Iterator[StepRecord]:
    """Raises NonFiniteError naming the first step whose loss or gradient is not finite, after the records before it."""
    history.first_read = history.first_read or len(readings)
    for reading in readings:
        batch = reading.batch
        record = StepRecord(
            step=history.last_step + 1,
            loss=reading.loss_sum / max(1, batch.supervised_tokens),
            lr=reading.lr,
            grad_norm=reading.grad_norm,
            tokens=batch.tokens,
            supervised_tokens=batch.supervised_tokens,
            step_s=reading.step_s,
            vram_mib=worker.ledger.used_mib(),
            skipped=reading.skipped,
        )
        history.skipped_in_a_row = history.skipped_in_a_row + 1 if record.skipped else 0
        _check_finite(record, history.skipped_in_a_row)
        history.steps.append(record)
        history.last_step = record.step
        micro_batches = batch.micro_batches
        history.rank_tokens.append(
            (sum(m.tokens for m in micro_batches), sum(m.supervised_tokens for m in micro_batches))
        )
        yield record


def _check_finite(record: StepRecord, skipped_in_a_row: int) -> None:
    if math.isfinite(record.loss) and (math.isfinite(record.grad_norm) or record.skipped):
        if skipped_in_a_row < SKIPS_IN_A_ROW:
            return
        what = f"{skipped_in_a_row} fp16 steps in a row overflowed"
    else:
        what = f"loss {record.loss}, gradient norm {record.grad_norm}"
    raise NonFiniteError(
        f"loss and gradients must be finite; step {record.step} has {what}. Its update was not applied.\n"
        "Lower train.lr, look at the data of that step, or use model.dtype=bfloat16 or float32.",
        step=record.step,
    )
