"""Which GPU a process of the tests may see. Imports no torch: the choice must come before CUDA is initialised."""

import glob
import os
import re


def pin_worker_to_one_gpu() -> None:
    """Let worker gwN of `pytest -n M` see one GPU alone, number N of those there are (again from the first where there
    are more workers than GPUs). Without workers or GPUs nothing changes."""
    worker = re.fullmatch(r"gw(\d+)", os.environ.get("PYTEST_XDIST_WORKER", ""))
    every_gpu = ",".join(str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*"))))
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", every_gpu).split(",") if gpu]
    if worker and gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(worker[1]) % len(gpus)]
