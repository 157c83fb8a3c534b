"""The weights that the adapter begins with, where they are not drawn: those of another adapter (lora.start_from), or
computed from the base's files or from the data (lora.init=loftq, eva)."""

from collections.abc import Iterable, Iterator

import torch

from launcher.checkpoint.start_adapter import load_start
from launcher.data.loader import TrainLoader
from launcher.data.pack.micro_batch import MicroBatch
from launcher.data.prepare import PreparedData
from launcher.errors import ContractError
from launcher.model.build import BuiltModel
from launcher.model.eva import eva_start
from launcher.model.loftq import loftq_start
from launcher.model.weight_files import read_headers
from launcher.recipe.lora_section import COMPUTED_STARTS
from launcher.records.run import Verdict
from launcher.runtime.clock import Clock
from launcher.train.request import Request
from launcher.train.step import arguments

EVA_TARGETS = 8192  # supervised tokens whose inputs lora.init=eva decomposes
EVA_POSITIONS = 32768  # of the blocks in which it looks for them


def start_adapter(
    built: BuiltModel, request: Request, data: PreparedData, *, clock: Clock
) -> tuple[tuple[Verdict, ...], tuple[str, ...]]:
    """Write the adapter's first weights as the recipe asks; returns what was checked of them, and notes.

    Raises RecipeError where the adapter, the weights or the data do not allow it, and ContractError for a start that
    fails its check."""
    lora = request.recipe.lora
    if lora.start_from:
        return (), (load_start(built.peft, lora, base=request.source),)
    if lora.init not in COMPUTED_STARTS:
        return (), ()
    phase = f"{lora.init} start"
    with clock.phase(phase):
        verdicts, source = (_loftq if lora.init == "loftq" else _eva)(built, request, data)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # its blocks are larger than any of training
    return verdicts, (f"lora.init={lora.init}: computed from {source}, in {clock.elapsed_s[phase]:.1f} s",)


def _loftq(built: BuiltModel, request: Request, data: PreparedData) -> tuple[tuple[Verdict, ...], str]:
    headers = read_headers(request.source, request.recipe.model.revision, download=True)
    assert headers is not None, "downloaded"
    verdict = loftq_start(built.peft, headers, dtype=built.dtype, seed=request.recipe.train.seed)
    if not verdict.holds:
        raise ContractError(
            f"lora.init=loftq must begin nearer to the weights of the files than NF4 is; {verdict.evidence}.\n"
            "Use lora.init=default, and report it."
        )
    return (verdict,), "what NF4 has rounded away"


def _eva(built: BuiltModel, request: Request, data: PreparedData) -> tuple[tuple[Verdict, ...], str]:
    device, train = built.packed.embed.weight.device, request.recipe.train
    micro_batches = [*_first_batches(data, micro_batch=train.micro_batch, seed=train.seed)]
    batches = [arguments(micro.to(device)) for micro in micro_batches]
    tokens = eva_start(built.packed, batches, targets=EVA_TARGETS, seed=train.seed)
    return (), f"the inputs at {tokens:,} supervised tokens of the first {len(batches)} micro batches"


def same_start(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every rank rank 0's weights: the same computation may be rounded otherwise elsewhere."""
    for parameter in parameters:
        torch.distributed.broadcast(parameter.data, src=0)


def _first_batches(data: PreparedData, *, micro_batch: int, seed: int) -> Iterator[MicroBatch]:
    """The run's first micro batches in the order of one process, whatever the number of ranks, until they have
    EVA_TARGETS or EVA_POSITIONS; at least one, at most an epoch (of a stream, its first window)."""
    loader = TrainLoader(data.first_blocks, micro_batch=micro_batch, accumulation=1, rank=0, world_size=1, seed=seed)
    targets = positions = 0
    for _ in range(loader.steps_per_epoch):
        [micro] = next(loader).micro_batches
        yield micro
        targets, positions = targets + micro.supervised_tokens, positions + micro.labels.numel()
        if targets >= EVA_TARGETS or positions >= EVA_POSITIONS:
            return
