"""The fastest matrix product that the device runs: what a training step's arithmetic is compared with."""

import time

import torch
from torch import Tensor

from launcher.records.bench import Ceiling

# Where memory is short, the next size is tried. On a CPU that emulates half precision a size of 512 takes 4 s.
SIZES = {"cuda": (8192, 4096, 2048), "cpu": (512,)}
MATMUL_RUNS = 5
RUN_S = 0.05  # one run repeats the product for about so long, so that waiting for the device hardly counts


def matmul_ceiling(dtype: torch.dtype, device: torch.device) -> Ceiling:
    """The rate of square products of normal entries, in the fastest run of the three layouts of a training step:
    forward x W^T, the input's gradient g W, a weight's gradient g^T x. Layouts differ most where half precision is
    emulated: 25 times on one CPU in bfloat16."""
    *larger, smallest = SIZES[device.type]
    for size in larger:
        try:
            return _measure(size, dtype, device)
        except torch.OutOfMemoryError:
            continue
    return _measure(smallest, dtype, device)


def _measure(size: int, dtype: torch.dtype, device: torch.device) -> Ceiling:
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    product_s = min(_product_s(*layout, device=device) for layout in ((a, b.T), (a, b), (a.T, b)))
    return Ceiling(str(dtype).removeprefix("torch."), size, 2 * size**3 / product_s)


def _product_s(a: Tensor, b: Tensor, *, device: torch.device) -> float:
    """Seconds of one product, in the fastest of a few runs."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=device)

    def run_s(products: int) -> float:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b, out=out)
        synchronise(device)
        return time.perf_counter() - start

    run_s(1)
    products = max(1, round(RUN_S / run_s(1)))
    return min(run_s(products) for _ in range(MATMUL_RUNS)) / products


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
