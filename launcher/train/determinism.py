"""train.deterministic: runs of one recipe on one kind of GPU have the same bits.

What else depends on it asks torch.are_deterministic_algorithms_enabled(): adapter gradients without atomic sums
(ops/adapter_gradients.py), no cuDNN attention (model/attention.py), and no benchmarks in Inductor (compile/plan.py),
whose winner decides how a sum is split.
"""

from collections.abc import Callable

import torch

from launcher.runtime.environment import set_for_run


def use_deterministic_kernels() -> Callable[[], None]:
    """Let torch use only deterministic kernels in this process, and raise where there is none; returns the function
    that puts back what was set before. Call it before anything is compiled: dynamo guards on it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    set_for_run("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # one write for each empty()

    def put_back() -> None:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]

    return put_back
