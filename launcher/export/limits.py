"""How far a written model may be from the trained one: docs/export.md has the measurements behind the figures."""

import torch

from launcher.records.export import ExportLimits

EXACT = ExportLimits(loss=1e-6, kl=1e-7, disagreement=0.0, rounded=False)  # the same files, loaded by the same code
SINGLE = ExportLimits(loss=1e-5, kl=1e-6, disagreement=0.001, rounded=False)  # merged; both sides in float32
HALF_WIDTH = ExportLimits(loss=5e-3, kl=1e-3, disagreement=0.01)  # merged; weights or computation in 16 bits
OTHER_BASE = ExportLimits(loss=0.05, kl=0.06, disagreement=0.1)  # on=original: the rounding of the base to NF4 besides
GGUF_LIMITS = {  # gguf, on=dequantised
    "f16": HALF_WIDTH,
    "bf16": HALF_WIDTH,
    "q8_0": ExportLimits(loss=5e-3, kl=2e-3, disagreement=0.02),
    "q6_k": ExportLimits(loss=0.01, kl=5e-3, disagreement=0.02),
    "q5_k_m": ExportLimits(loss=0.03, kl=0.02, disagreement=0.03),
    "q4_k_m": ExportLimits(loss=0.1, kl=0.06, disagreement=0.06),
}
BLOCK_ERRORS = {  # root mean square of a tensor's error by that of its values, at most; by type of the tensor
    "Q6_K": 0.03, "Q5_K": 0.06, "Q5_0": 0.08, "Q5_1": 0.08, "Q4_K": 0.12, "Q4_0": 0.12, "Q4_1": 0.12,
}  # fmt: skip


def limits_of(*, on: str, dtypes: tuple[torch.dtype, ...], quantization: str = "") -> ExportLimits:
    """`on`: "" where nothing is merged. `dtypes`: in which the trained model computes, and of the written weights.
    `quantization`: of a GGUF file."""
    if not on:
        return EXACT
    if on == "original":
        return _sum(OTHER_BASE, GGUF_LIMITS[quantization]) if quantization else OTHER_BASE
    if quantization:
        return GGUF_LIMITS[quantization]
    return SINGLE if all(dtype == torch.float32 for dtype in dtypes) else HALF_WIDTH


def _sum(one: ExportLimits, other: ExportLimits) -> ExportLimits:
    return ExportLimits(one.loss + other.loss, one.kl + other.kl, one.disagreement + other.disagreement)
