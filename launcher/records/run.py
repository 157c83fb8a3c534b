"""The records of a run: plain frozen data, made on every rank, shown on rank 0, written to report.json.

Stdlib only. Units are in the names: `_mib` is 2**20 bytes, `_s` seconds, `_ms` milliseconds. Counts are per process.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.records.explanation import Explanation

REPORT_SCHEMA = 1


@dataclass(frozen=True)
class Phase:
    """A phase begins that can tell how far it has come."""

    name: str
    progress: Callable[[], str]  # e.g. "graphs: layer 1 of 2"; may be called from any thread


@dataclass(frozen=True)
class RunOpened:
    """The run has its folder: from here on its files may be written."""

    path: Path  # absolute, the same on every rank
    step: int = 0  # steps done by earlier parts of the run


@dataclass(frozen=True)
class Note:
    """What the user should know before the run ends."""

    text: str


@dataclass(frozen=True)
class RunPart:
    """What one start of a run did, between two resumes."""

    host: str
    first_step: int  # 1-based
    last_step: int  # the last that counts: those after it were done again
    lost_s: float = 0.0  # seconds of the steps that were done again


@dataclass(frozen=True)
class StartRecord:
    """What is about to run, shown as the start panel. Made on rank 0 once the model is built."""

    recipe: str  # its name or path
    model: str  # hub id or folder
    family: str  # architecture, e.g. "llama"
    parameters: int  # all parameters, quantised ones counted unpacked
    trainable: int
    device: str  # "cpu" or e.g. "NVIDIA H200"
    world_size: int
    dtype: str
    quantization: str  # e.g. "nf4, double quantised"
    attention: str  # the attention path chosen, and why
    micro_batch: int
    widths: tuple[int, ...]  # positions of a block: one width, or the few of data.batching=bucketed
    accumulation: int
    steps: int
    epochs: float | None  # passes over the blocks; None of a stream
    optimizer: str
    compile: str  # e.g. "strict, scope layer, inductor"
    batching: str
    streamed: bool  # train_blocks and fill are then of the first window, and train_rows is not known
    template: str  # the chat template in use
    loss_on: dict[str, int]  # training rows by what the loss sees of them
    train_rows: int
    train_blocks: int  # blocks of those widths
    validation_rows: int
    fill: float  # 0-1: share of positions that hold a token
    run_dir: str
    notes: tuple[str, ...] = ()  # anything chosen automatically that the user should know
    cuda_graphs: str = "off"  # "on", or "off (the reason)"
    activations: str = "none"  # the policy, and why
    forecast_mib: float | None = None  # peak of allocated memory forecast for that policy; None on a CPU
    loss_tokens: tuple[int, ...] = ()  # by width: tokens of a micro batch for which the loss is computed
    lora: str = ""  # rank, alpha, and what else differs from the defaults


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, over all ranks: a line of metrics.jsonl."""

    step: int  # 1-based
    loss: float  # mean over the supervised tokens of all ranks and micro batches
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # non-padding tokens, all ranks
    supervised_tokens: int
    step_s: float
    vram_mib: float  # allocated on this rank (resident memory on a CPU)
    skipped: bool = False  # fp16 only: overflow, the update was skipped and the scale halved
    spike: bool = False  # gradient norm or loss far above the usual of the steps before


@dataclass(frozen=True)
class EvalRecord:
    """One pass over the validation blocks, over all ranks. `step` 0 is before the first update."""

    step: int
    eval_loss: float


@dataclass(frozen=True)
class GraphRecord:
    """What is inside one compiled graph. Calls of opaque operators and reads by the host are among its nodes."""

    region: str
    nodes: int  # calls of the FX graph, nested bodies included
    opaque: dict[str, int]  # calls by operator: the compiler does not see into them
    digest: str  # of program and inputs


@dataclass(frozen=True)
class CompileRecord:
    """What torch.compile did in this process."""

    planned_graphs: int  # graphs compiled in warm-up that the plan asked for
    expected_graphs: int  # graphs the plan asks for
    compilations: int  # every compilation of this process, planned or not
    graph_breaks: int
    recompiles: int
    limit_hits: int
    forward_s: float
    backward_s: float
    cache_hits: int
    graph_hash: str  # of all graphs and the operators' sources; equal ranks have equal ones; "-": nothing was compiled
    graph_break_reasons: tuple[str, ...] = ()  # reason and user line, one each
    recompile_reasons: tuple[str, ...] = ()  # the guard that failed, one each
    backend_errors: int = 0
    backend_error_reasons: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()  # compile.mode=warn only: what runs uncompiled, and why
    graphs_by_region: dict[str, int] = field(default_factory=dict)
    graphs: tuple[GraphRecord, ...] = ()  # in the order of compilation
    steps: int = 0  # after warm-up
    steps_compiled: int = 0  # of them, those whose every micro batch made all planned calls of compiled code
    evaluations: int = 0  # micro batches evaluated after warm-up
    evaluations_compiled: int = 0
    calls: dict[str, int] = field(default_factory=dict)  # planned for one micro batch of the largest shape
    cache_misses: int = 0  # graphs whose code was generated: neither it nor a fit one was in the cache
    explanations: tuple[Explanation, ...] = ()  # of every break, recompile, limit hit and backend error


@dataclass(frozen=True)
class VramRecord:
    """Memory at the end of one phase on one rank. On a CPU all figures are the process's resident memory."""

    phase: str  # "before load", "after load", "after adapters", "after compile", "after capture", "after training"
    allocated_mib: float
    reserved_mib: float
    peak_mib: float  # highest allocated since the process began
    total_mib: float  # the device's (the machine's) memory


@dataclass(frozen=True)
class RankRecord:
    """What one process measured of its run. Rank 0 gathers one from each rank."""

    rank: int
    device: str
    compile: CompileRecord
    vram: tuple[VramRecord, ...]
    vram_before_mib: float  # allocated before the first training step
    vram_after_mib: float  # allocated after the last
    vram_peak_mib: float
    tokens_per_s: float  # this rank's, over the steady steps
    supervised_tokens_per_s: float
    step_ms_median: float
    step_ms_p90: float

    def as_report(self) -> dict[str, Any]:
        """The rank's entry in report.json (key names are public: add, never rename)."""
        return {
            "rank": self.rank,
            "device": self.device,
            "compile": asdict(self.compile),
            "vram": {
                "before_mib": self.vram_before_mib,
                "after_mib": self.vram_after_mib,
                "peak_mib": self.vram_peak_mib,
                "phases": [asdict(v) for v in self.vram],
            },
            "tokens_per_s": self.tokens_per_s,
            "supervised_tokens_per_s": self.supervised_tokens_per_s,
            "step_ms": {"median": self.step_ms_median, "p90": self.step_ms_p90},
        }


@dataclass(frozen=True)
class Verdict:
    """One claim, whether it holds, and the figures that decided it."""

    claim: str
    holds: bool
    evidence: str


@dataclass(frozen=True)
class Sample:
    """One prompt of the validation set, what the data answers and what the trained model answers (greedy)."""

    prompt: str
    expected: str
    generated: str


@dataclass(frozen=True)
class EvalSamples:
    """What the model answers at an evaluation: lines of samples.jsonl. The prompts are the same at each."""

    step: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class BatchDocument:
    """A document of a batch that did harm."""

    micro_batch: int
    block: int
    ids: list[int]
    labels: list[int]  # by position the token that it must predict; -100 where there is no loss
    text: str


@dataclass(frozen=True)
class BadBatch:
    """What one rank was given at a step that went wrong, so that it can be looked at: a file of bad_batches/."""

    step: int
    rank: int
    documents: tuple[BatchDocument, ...]


def losses_of(steps: Sequence[StepRecord], evals: Sequence[EvalRecord]) -> dict[str, float | None]:
    """First and last losses, as reports have them; None where there is none."""
    return {
        "first": steps[0].loss if steps else None,
        "last": steps[-1].loss if steps else None,
        "eval_first": evals[0].eval_loss if evals else None,
        "eval_last": evals[-1].eval_loss if evals else None,
    }


@dataclass(frozen=True)
class RunRecord:
    """The whole run, on rank 0: the summary on the console and report.json."""

    recipe: dict[str, Any]  # resolved
    start: StartRecord
    steps: tuple[StepRecord, ...]
    evals: tuple[EvalRecord, ...]
    elapsed_s: dict[str, float]  # by phase, in order
    ranks: tuple[RankRecord, ...]
    verdicts: tuple[Verdict, ...]
    data: dict[str, int] = field(default_factory=dict)  # rows read, dropped by reason, documents, tokens
    sample: Sample | None = None
    parts: tuple[RunPart, ...] = ()
    no_sample: str = ""  # why there is none
    stopped: str = ""  # why training ended before its last step; "" where it did not
    notes: tuple[str, ...] = ()  # what was noticed after the start
    adapter: str | None = None  # its folder; None where it was not proven, or where its base is random
    versions: dict[str, str] = field(default_factory=dict)  # of Python and the packages that decide what is computed
    eval_adapter: float | None = None  # eval loss of the adapter that was saved: with train.keep_best the best one's
    recipe_origins: dict[str, str] = field(default_factory=dict)  # file or command line, of the keys that were given

    def as_report(self) -> dict[str, Any]:
        """report.json (its keys are public: add, never rename)."""
        return {
            "schema": REPORT_SCHEMA,
            "recipe": self.recipe,
            "recipe_origins": self.recipe_origins,
            "start": asdict(self.start),
            "loss": losses_of(self.steps, self.evals) | {"eval_adapter": self.eval_adapter},
            "elapsed_s": self.elapsed_s,
            "data": self.data,
            "verdicts": [asdict(v) for v in self.verdicts],
            "ranks": [r.as_report() for r in self.ranks],
            "sample": asdict(self.sample) if self.sample else None,
            "parts": [asdict(part) for part in self.parts],
            "no_sample": self.no_sample,
            "stopped": self.stopped,
            "notes": self.notes,
            "adapter": self.adapter,
            "versions": self.versions,
        }


# What a run yields and a sink is shown, in this order; the text is the name of the phase that begins.
Event = str | Phase | RunOpened | StartRecord | Note | StepRecord | EvalRecord | EvalSamples | BadBatch | RunRecord
