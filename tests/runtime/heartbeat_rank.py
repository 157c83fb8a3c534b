"""Run by test_heartbeat.py: one rank with a heartbeat and without torch. Its main thread does what it is told after
step 2, and says "lost CODE" if it is to be ended by the thread. Arguments: rank, ranks, deed, timeout in seconds, file.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from launcher.errors import LostRank, MemoryExhausted  # noqa: E402
from launcher.records.run import RunOpened, StepRecord  # noqa: E402
from launcher.runtime import heartbeat  # noqa: E402
from launcher.runtime.failures import code_and_reason  # noqa: E402
from launcher.runtime.progress import PROGRESS  # noqa: E402
from launcher.runtime.ranks import RankInfo  # noqa: E402

rank, ranks, deed, timeout_s, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), sys.argv[5]


def broadcast(value: Any) -> Any:
    """Through a file: there is no process group."""
    if rank == 0:
        Path(f"{file}.part").write_text(json.dumps(value))
        os.rename(f"{file}.part", file)
    while not os.path.exists(file):
        time.sleep(0.01)
    return json.loads(Path(file).read_text())


def step(number: int) -> None:
    PROGRESS.enter_collective()
    beat.show(StepRecord(number, 1.0, 1e-3, 1.0, 9, 9, 1.0, 1.0))


heartbeat.broadcast = broadcast
beat = heartbeat.Heartbeat(
    RankInfo(rank, rank, ranks, ranks),
    timeout_s=timeout_s or None,
    on_lost=lambda ending, told: print("lost", ending.code, ending.rank, ending.reason, flush=True),
    saving=lambda: False,
)
try:
    beat.show(RunOpened(Path("run")))
    with PROGRESS.phase("train"):
        step(1)
        step(2)
        print("step 2", flush=True)
        if deed == "waits":
            PROGRESS.enter_collective()
        if deed in ("waits", "sleeps"):
            time.sleep(600)
        if deed == "memory":
            raise MemoryExhausted("the device ran out of memory")
        if deed == "meets it":
            PROGRESS.enter_collective()
            time.sleep(1)
            raise LostRank("another rank ended first")
        if deed == "steps":
            for number in range(3, 15):
                step(number)
                time.sleep(0.5)
except Exception as failure:
    cause = beat.first_cause(failure)
    print("ends with", *code_and_reason(cause), flush=True)
    code = getattr(cause, "code", 1)
else:
    code = 0
finally:
    beat.close()
sys.exit(code)
