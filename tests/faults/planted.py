"""Run under a two-process launch by the tests of this folder: the command line, with a fault planted on one rank.

Arguments: the fault, its rank, a file, and the recipe's. It comes in the forward pass of step 3 (save: in the
checkpoint of step 2). The file gets the monotonic clock of that moment. worse: from step 4 on training goes up the
gradient, on every rank.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch  # noqa: E402

from launcher.checkpoint import bundle  # noqa: E402
from launcher.cli import main  # noqa: E402
from launcher.errors import DataError  # noqa: E402
from launcher.model.packed import PackedCausalLM  # noqa: E402


def lose_data() -> None:
    raise DataError("the data must stay; that of one rank is gone")


FAULTS = {
    "data": lose_data,
    "nan": lambda: None,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(600),
    "memory": lambda: torch.empty(2**50),
}
fault, rank, moment, *argv = sys.argv[1:]
original, save_file, calls, saves = PackedCausalLM.forward, bundle.save_file, [], []


def fell() -> None:
    Path(moment).write_text(str(time.monotonic()))


def forward(self: PackedCausalLM, *inputs: torch.Tensor) -> torch.Tensor:
    """Calls with gradients: the warm-up's, then one micro batch a step; the fourth is that of step 3."""
    calls.extend([1] if torch.is_grad_enabled() else [])
    planted = torch.is_grad_enabled() and len(calls) == 4 and os.environ["RANK"] == rank
    if planted and fault in FAULTS:
        fell()
        FAULTS[fault]()
    loss = original(self, *inputs)
    if fault == "worse" and torch.is_grad_enabled() and len(calls) > 4:
        return -loss
    return loss * float("nan") if planted and fault == "nan" else loss


def save(*arguments: Any) -> None:
    saves.append(1)
    if fault == "save" and len(saves) == 2:
        fell()
        raise OSError(28, os.strerror(28))
    save_file(*arguments)


PackedCausalLM.forward, bundle.save_file = forward, save  # type: ignore[method-assign]
sys.exit(main(argv))
