"""fp16's loss scale as torch.amp.GradScaler keeps it, but wholly on the device: following it costs the host no wait."""

import torch
from torch import Tensor

INITIAL = 2.0**16  # this and the three below are torch.amp.GradScaler's defaults
GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000


class LossScale:
    """`value` multiplies the loss, fp32 scalar; it is 1 and stays so where `enabled` is False."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._enabled = enabled
        self.value = torch.full((), INITIAL if enabled else 1.0, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

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
            torch._amp_update_scale_(self.value, self._good_steps, overflow, GROWTH, BACKOFF, INTERVAL)

    def saved(self) -> tuple[Tensor, Tensor]:
        return self.value.clone(), self._good_steps.clone()

    def restore(self, saved: tuple[Tensor, Tensor]) -> None:
        self.value.copy_(saved[0])
        self._good_steps.copy_(saved[1])
