"""fp16's loss scale: torch.amp.GradScaler's rule, computed on the device, so that the host never waits for it."""

import torch
from torch import Tensor

INITIAL = 2.0**16  # this and the three below are torch.amp.GradScaler's defaults
GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0, 0.5, 2000


class LossScale:
    """`value` (fp32 scalar) multiplies the loss; it stays 1 where `enabled` is False. `good_steps` (int32 scalar)
    counts steps since the last overflow or growth."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._enabled = enabled
        self.value = torch.full((), INITIAL if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def is_enabled(self) -> bool:
        return self._enabled

    def get_scale(self) -> float:
        """Waits for the device."""
        return float(self.value)

    def update(self, scale: float) -> None:
        """Set the scale."""
        self.value.fill_(scale)

    def follow(self, overflow: Tensor) -> None:
        """Halve the scale after a step that overflowed (`overflow`: fp32, 0 or 1), double it after 2,000 without."""
        if self._enabled:
            torch._amp_update_scale_(self.value, self.good_steps, overflow, GROWTH, BACKOFF, GROWTH_INTERVAL)
