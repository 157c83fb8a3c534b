"""What must be settled in the environment before torch is imported. Imports no torch."""

import logging
import os
import warnings

from launcher.compile.inductor_cache import prepare_cache
from launcher.runtime.ranks import RankInfo

# Turns that an idle OpenMP thread (GNU's) spins before it sleeps. The default spins for so long that one busy neighbour
# on a two-core machine made a step of recipe=tiny 2.9 times slower (1,441 against 490 ms); with this it is 1.5 times
# (745 ms), and the undisturbed step costs the same 488 ms.
SPIN_COUNT = "2000"


def prepare_environment(rank_info: RankInfo) -> tuple[str, ...]:
    """Private compile cache, capped compile workers, quiet libraries. Returns notes for the report."""
    note = prepare_cache(workers=rank_info.cores)
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # set, it does not warn about forks
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    return (note,) if note else ()
