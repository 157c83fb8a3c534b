"""What mode=bench measured: plain frozen records. Shown by report/pages/bench.py, written to report=PATH.

proof/bench/figures.py computes what is derived. Memory is resident memory on a CPU.
"""

from dataclasses import dataclass, field

from launcher.records.proof import ProofRecord
from launcher.records.run import CompileRecord, StartRecord, Verdict, VramRecord


@dataclass(frozen=True)
class Workload:
    """What each step trains on, the first included: the same on both sides."""

    tokens: tuple[int, ...]  # padding not counted
    supervised_tokens: tuple[int, ...]
    flops: tuple[int, ...]  # of the model (proof/bench/flops.py), without recomputation
    naive_passes: tuple[int, ...]  # forward passes of the naive side, which pads; ours makes one a micro batch
    batches: str  # digest of ids, labels and document boundaries


@dataclass(frozen=True)
class Ceiling:
    """The fastest that one large matrix product ran on the device, in the dtype of the run."""

    dtype: str
    size: int  # of the two square matrices
    flops_per_s: float


@dataclass(frozen=True)
class Spread:
    """Of the measured steps."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class SideRecord:
    """One side, measured in a process of its own. Where it failed: what it had measured until then."""

    phases_s: dict[str, float] = field(default_factory=dict)  # from the process's start to the first step's end
    first_step_s: float | None = None  # that whole time
    losses: tuple[float, ...] = ()  # of every step: means over the supervised tokens
    steps_s: tuple[float, ...] = ()  # of the measured steps, which are the last ones
    vram: tuple[VramRecord, ...] = ()
    peak_allocated_mib: float | None = None
    peak_reserved_mib: float | None = None
    batches: str = ""  # digest of what it trained on
    failure: str = ""
    out_of_memory: bool = False
    before_mib: float | None = None  # allocated before the first step
    # Derived; None where the side failed.
    step_ms: Spread | None = None
    tokens_per_s: float | None = None
    ceiling_share: float | None = None  # 0-1: the model's FLOP/s by those of the ceiling


@dataclass(frozen=True)
class OursRecord:
    """Our side, with what only its process knows."""

    side: SideRecord
    start: StartRecord
    compile: CompileRecord
    ceiling: Ceiling
    loss_tolerance: float
    loaded: tuple[Verdict, ...] = ()  # whether the base is what its files hold; empty for random weights


@dataclass(frozen=True)
class SpeedComparison:
    """Ours beside one naive side. Ratios and differences are None or empty where that was left out or failed."""

    speed_up: float | None = None  # median step of naive by that of ours
    memory_ratio: float | None = None  # peak of allocated memory of ours by that of naive
    pay_back_steps: int | None = None  # steps after the first until ours is ahead; None also where it never is
    loss_differences: tuple[float, ...] = ()  # of each step, relative to naive's loss


@dataclass(frozen=True, kw_only=True)
class BenchRecord(ProofRecord, SpeedComparison):
    """The whole comparison, with `naive` where nothing else is said."""

    mode = "bench"
    rule = "both sides must train on the same: their speeds cannot be compared where it says:"
    remedy = "mode=parity tells which part of the model differs."

    rows: str  # "data" or "random"
    ceiling: Ceiling
    workload: Workload
    ours: SideRecord
    naive: SideRecord | None  # with gradient checkpointing; None where it was left out
    plain: SideRecord | None  # the same without checkpointing; None where it was left out
    to_plain: SpeedComparison
    loss_tolerance: float  # largest difference at the first step
