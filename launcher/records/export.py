"""What mode=export measured: plain frozen records. Shown by report/pages/export.py, written to report=PATH."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from launcher.records.proof import JudgedRecord


@dataclass(frozen=True)
class ExportLimits:
    """How far a written model may be from the trained one."""

    loss: float  # difference of the mean losses, nats
    kl: float  # mean over the compared positions, nats
    disagreement: float  # share of the compared positions, as of ExportFigures
    rounded: bool = True  # to 16 bits or fewer, which scatters the losses of single tokens


@dataclass(frozen=True)
class ExportFigures:
    """Both models on the same held-out documents, each token after the data's own tokens."""

    documents: int
    tokens: int  # supervised: losses and agreement are over all of them
    positions: int  # of them those whose logits are compared
    trained_loss: float
    written_loss: float
    largest_logit_difference: float
    mean_logit_difference: float  # absolute
    mean_kl: float  # of the written model's distribution from the trained one's
    largest_kl: float
    agreement: float  # 0-1: share of the tokens for which both have the same likeliest token
    disagreement: float  # 0-1: share of the compared positions where they differ by more than a tie of the trained one
    loss_scatter: float = 0.0  # of the difference of the losses: twice its standard error over the tokens, nats

    @property
    def loss_difference(self) -> float:
        return abs(self.written_loss - self.trained_loss)

    def loss_limit(self, limits: ExportLimits) -> float:
        """The most that the losses may differ by: of few tokens rounding alone makes more than the limit for many.
        Their scatter counts as far as the limit of KL lets it be: of logits that are off by a little, the loss of a
        token has the variance 2 KL."""
        allowed = 2 * math.sqrt(2 * limits.kl / self.tokens) if limits.rounded else 0.0
        return limits.loss + min(self.loss_scatter, allowed)


@dataclass(frozen=True)
class GreedyPair:
    """Greedy answers of both models to one prompt: they may part where two tokens are equally likely."""

    prompt: str
    trained: str
    written: str
    tokens: int  # of the longer answer
    agreed: int  # leading tokens that are the same
    ended: tuple[bool, bool]  # by a stop token, within the tokens that were allowed: trained, written


@dataclass(frozen=True, kw_only=True)
class ExportRecord(JudgedRecord):
    """A written model and how it was proved. Losses, KL: nats."""

    mode = "export"
    rule = "an exported model must be the trained one; it is not where it says:"
    remedy = "It is kept aside, with .unproven at the end of its folder's name, and not to be used."

    run: str
    base: str  # hub id or folder
    folder: str  # where it lies: to, or to.unproven
    format: str
    on: str  # "" where nothing is merged
    dtype: str  # of the written weights
    trained_dtype: str  # in which the trained model computes
    device: str
    files: dict[str, int]  # bytes by name
    data: str  # what the figures were measured on
    limits: ExportLimits
    figures: ExportFigures
    answers: tuple[GreedyPair, ...]
    stop_tokens: tuple[str, ...]
    peak_mib: float  # highest resident memory of the process until the files were written
    elapsed_s: dict[str, float]  # by phase, in order

    def as_report(self) -> dict[str, Any]:
        figures = {**asdict(self.figures), "loss_difference": self.figures.loss_difference}
        return {**super().as_report(), "figures": figures}
