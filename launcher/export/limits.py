"""How far a written model may be from the trained one: docs/export.md has the measurements behind the figures."""

import torch

from launcher.records.export import ExportLimits

EXACT = ExportLimits(loss=1e-6, kl=1e-7, disagreement=0.0)  # the same files, loaded by the same code
SINGLE = ExportLimits(loss=1e-5, kl=1e-6, disagreement=0.001)  # merged; all of both sides in float32
HALF_WIDTH = ExportLimits(loss=5e-3, kl=1e-3, disagreement=0.01)  # merged; weights or computation in 16 bits
OTHER_BASE = ExportLimits(loss=0.05, kl=0.06, disagreement=0.1)  # on=original: the rounding of the base to NF4 besides


def limits_of(*, on: str, dtypes: tuple[torch.dtype, ...]) -> ExportLimits:
    """`on`: "" where nothing is merged. `dtypes`: in which the trained model computes, and of the written weights."""
    if not on:
        return EXACT
    if on == "original":
        return OTHER_BASE
    return SINGLE if all(dtype == torch.float32 for dtype in dtypes) else HALF_WIDTH
