"""Random NF4 weights and LoRA adapters for the tests of the operators."""

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from launcher.ops.nf4 import Nf4


def quantised(
    features: int, out: int, *, double: bool = True, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Nf4, Tensor]:
    """A random weight [out, features] as NF4, and as bitsandbytes dequantises it."""
    weight = torch.randn(out, features, device=device).to(dtype) / features**0.5
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    second = (state.state2.absmax, state.state2.code, state.offset) if double else ()
    return Nf4(packed, state.absmax, state.code, *second), bnb.dequantize_4bit(packed, state)


def adapters(features: int, out: int, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, features] and B [out, rank], fp32."""
    return torch.randn(rank, features) / features**0.5, torch.randn(out, rank) / rank**0.5
