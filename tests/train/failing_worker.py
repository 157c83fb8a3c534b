"""Run by test_ranks.py under a two-process launch: the command line, with a fault planted on rank 1.

First argument: shape (of a batch of step 2, which was not planned), adapter (the one it starts from) or eva (the one
that it computes).
"""

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch  # noqa: E402

from launcher.cli import main  # noqa: E402
from launcher.model import build  # noqa: E402
from launcher.model.packed import PackedCausalLM  # noqa: E402
from launcher.train import adapter_start  # noqa: E402

fault, *argv = sys.argv[1:]
original, calls = PackedCausalLM.forward, []


def forward(self: PackedCausalLM, *inputs: torch.Tensor) -> torch.Tensor:
    """Calls with gradients: the warm-up's, then two micro batches a step; the fourth is in step 2."""
    calls.extend([1] if torch.is_grad_enabled() else [])
    planted = torch.is_grad_enabled() and len(calls) == 4 and os.environ["RANK"] == "1"
    if planted and fault == "shape":
        inputs = tuple(t[:, :32] if t.ndim == 2 else t for t in inputs)
    return original(self, *inputs)


def attach_lora(*arguments: Any, **options: Any) -> Any:
    model = attached(*arguments, **options)
    if fault == "adapter" and os.environ["RANK"] == "1":
        first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        first.data[0, 0] += 1e-3
    return model


def eva_start(packed: Any, *arguments: Any, **options: Any) -> int:
    tokens = computed(packed, *arguments, **options)
    if fault == "eva" and os.environ["RANK"] == "1":
        next(parameter for parameter in packed.parameters() if parameter.requires_grad).data[0, 0] += 1e-3
    return tokens


adapter_start.eva_start, computed = eva_start, adapter_start.eva_start
build.attach_lora, attached = attach_lora, build.attach_lora
PackedCausalLM.forward = forward  # type: ignore[method-assign]
sys.exit(main(argv))
