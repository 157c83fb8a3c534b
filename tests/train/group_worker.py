"""Run by test_ranks.py: many short lives of a gloo group that DDP shares. Each ends right after a collective."""

import gc
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

sys.path[0] = str(Path(__file__).resolve().parents[2])

from launcher.runtime.ranks import hold_process_group, release_process_group  # noqa: E402


def main(lives: int) -> None:
    torch.set_num_threads(1)
    for life in range(lives):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        hold_process_group()
        wrapped = DistributedDataParallel(torch.nn.Linear(4, 4))
        wrapped(torch.ones(2, 4)).sum().backward()
        tensors = [torch.ones(4) for _ in range(8)]
        works = [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
        while works:
            works.pop().wait()
        del tensors
        distributed.destroy_process_group()
        del wrapped
        release_process_group()
        if life == 0:
            gc.freeze()  # release_process_group collects garbage: torch's own objects need not be walked each time


main(int(sys.argv[1]))
