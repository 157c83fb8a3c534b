"""What mode=evaluate measured: plain frozen records. Shown by report/pages/evaluation.py, written to report=PATH."""

import math
from dataclasses import dataclass
from typing import Any

from launcher.records.answers import Answered
from launcher.records.proof import JudgedRecord


@dataclass(frozen=True)
class ModelFigures:
    """One model on the supervised tokens, each after the data's own tokens."""

    loss: float  # mean, nats
    accuracy: float  # 0-1: share of the tokens that are the model's likeliest

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(JudgedRecord):
    """An adapter on data."""

    mode = "evaluate"
    rule = "an adapter on its base must give what its run measured; it does not:"
    remedy = "The adapter, its base or a package is not what it was: docs/evaluate.md."

    run: str
    base: str  # hub id or folder
    device: str
    dtype: str
    data: str
    rows: int | None  # None where they are not known
    documents: int
    tokens: int
    supervised_tokens: int
    loss_on: dict[str, int]  # rows by what the loss sees of them; empty where it is not known
    counts: dict[str, int]  # of data that was given: what was read and left out
    trained: ModelFigures
    without_adapter: ModelFigures | None
    run_eval_loss: float | None  # of the same adapter and data, as the run measured it
    answers: tuple[Answered, ...]
    elapsed_s: dict[str, float]  # by phase, in order

    def as_report(self) -> dict[str, Any]:
        report = super().as_report()
        for key, figures in (("trained", self.trained), ("without_adapter", self.without_adapter)):
            if figures:
                report[key]["perplexity"] = figures.perplexity if math.isfinite(figures.perplexity) else None
        return report
