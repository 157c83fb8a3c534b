"""The final norm where no compiled graph holds it: torch's own kernel, one launch each way.

transformers' RMSNorm is written in some eight elementwise operations with fp32 results [B, S, D] in between; the
compiler fuses them in the layers, and the final norm stands outside (compile.scope=layer). torch's also rounds once,
not twice.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def use_native_kernel(norm: nn.Module) -> None:
    """Give a transformers RMSNorm torch's kernel, in place; it stays an instance of its class."""
    norm.__class__ = type(f"Native{type(norm).__name__}", (type(norm),), {"forward": _forward})


def _forward(self: Any, hidden_states: Tensor) -> Tensor:
    """hidden_states [..., D] -> [..., D]."""
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
