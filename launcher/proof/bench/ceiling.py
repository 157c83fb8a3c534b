"""The fastest matrix product that the device runs: what a training step's arithmetic is compared with."""

import time

import torch
from torch import Tensor

from launcher.records.bench import Ceiling

# The next one where the memory left is too little. On a CPU that emulates half precision a size of 512 takes 4 s.
SIZES = {"cuda": (8192, 4096, 2048), "cpu": (512,)}
RUNS = 5
RUN_S = 0.05  # of products behind one another: beside it, waiting for the device is little


def matmul_ceiling(dtype: torch.dtype, device: torch.device) -> Ceiling:
    """Of square matrices with normal entries, the fastest of a few runs in each layout that a step has: forward x W^T,
    the input's gradient g W, a weight's gradient g^T x. They differ most where half precision is emulated: 25 times on
    one CPU in bfloat16."""
    sizes = SIZES[device.type]
    for size in sizes:
        try:
            return Ceiling(str(dtype).removeprefix("torch."), size, _flops_per_s(size, dtype, device))
        except torch.OutOfMemoryError:
            if size == sizes[-1]:
                raise
    raise AssertionError


def _flops_per_s(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / min(_seconds(*layout, device=device) for layout in ((a, b.T), (a, b), (a.T, b)))


def _seconds(a: Tensor, b: Tensor, *, device: torch.device) -> float:
    """Of one product, the least of a few runs."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=device)

    def taken(products: int) -> float:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b, out=out)
        synchronise(device)
        return time.perf_counter() - start

    taken(1)
    products = max(1, round(RUN_S / taken(1)))
    return min(taken(products) for _ in range(RUNS)) / products


def synchronise(device: torch.device) -> None:
    """Wait for everything that the device was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
