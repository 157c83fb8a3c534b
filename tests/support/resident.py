"""Memory of this process, as Linux counts it."""

import re
from pathlib import Path


def resident_kib(field: str) -> int:
    """VmRSS, now; VmHWM, at most since clear_refs (man 5 proc)."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
