"""How far a written model may be from the trained one: docs/export.md has the measurements behind the figures."""

import torch

from launcher.records.export import ExportLimits

EXACT = ExportLimits(loss=1e-6, kl=1e-7, agreement=1.0)  # the same files, loaded by the same code
MERGED = {  # by whether one side computes in 16 bits or holds weights in them, and by what is merged into
    ("dequantised", False): ExportLimits(loss=1e-4, kl=1e-5, agreement=0.998),
    ("dequantised", True): ExportLimits(loss=5e-3, kl=1e-3, agreement=0.98),
    ("original", False): ExportLimits(loss=0.1, kl=0.05, agreement=0.85),
    ("original", True): ExportLimits(loss=0.1, kl=0.05, agreement=0.85),
}


def limits_of(*, on: str, dtypes: tuple[torch.dtype, ...]) -> ExportLimits:
    """`on`: "" where nothing is merged. `dtypes`: in which the trained model computes, and of the written weights."""
    return MERGED[on, any(dtype != torch.float32 for dtype in dtypes)] if on else EXACT
