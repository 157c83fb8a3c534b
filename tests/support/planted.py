"""Losses that are not what the model says."""

from typing import Any

import pytest
import torch

from launcher.model.packed import PackedCausalLM


def plant(monkeypatch: pytest.MonkeyPatch, factors: dict[int, float], *, evaluations: float = 1.0) -> None:
    """Multiply the loss, and so the gradients, of these training passes (the warm-up's is number 0)."""
    original, calls = PackedCausalLM.forward, list[int]()

    def forward(self: Any, *inputs: Any) -> Any:
        loss = original(self, *inputs)
        if not torch.is_grad_enabled():
            return loss * evaluations
        calls.append(1)
        return loss * factors.get(len(calls) - 1, 1.0)

    monkeypatch.setattr(PackedCausalLM, "forward", forward)
