"""The memory ledger: what this process holds at the end of each phase.

On a GPU: what PyTorch has allocated and reserved, and the GPU's total. On a CPU: resident memory, the machine's total.
"""

import resource

import psutil
import torch

from launcher.records.run import VramRecord

MIB = 2**20  # bytes


class Ledger:
    """Records memory by phase on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phases: list[VramRecord] = []

    def mark(self, phase: str) -> VramRecord:
        """Append and return the record of `phase`, which has just ended."""
        if self.device.type == "cuda":
            reserved = torch.cuda.memory_reserved(self.device) / MIB
            total = torch.cuda.get_device_properties(self.device).total_memory / MIB
        else:
            reserved = self.used_mib()
            total = psutil.virtual_memory().total / MIB
        record = VramRecord(phase, self.used_mib(), reserved, self.peak_mib(), total)
        self.phases.append(record)
        return record

    def used_mib(self) -> float:
        """Allocated now (resident memory on a CPU). Does not wait for the device."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) / MIB
        return float(psutil.Process().memory_info().rss) / MIB

    def free_mib(self) -> float | None:
        """What this process can still allocate on its GPU; None on a CPU."""
        if self.device.type != "cuda":
            return None
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return float(torch.cuda.mem_get_info(self.device)[0] + cached) / MIB

    def peak_mib(self) -> float:
        """The most that this process has ever allocated (highest resident memory on a CPU)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts it in KiB

    def as_text(self) -> str:
        """The phases so far in one line, for an out-of-memory message."""
        return ", ".join(f"{p.phase} {p.allocated_mib:,.0f} MiB" for p in self.phases) or "nothing yet"
