"""Everything before the first step, in the order in which it happens.

prepare_inputs    what is known without weights: config, tokenizer, data, device. Finds every fault of recipe and
                  data before the process group, the run folder or the weights exist.
Worker            the process group; every rank has read the same
.open_folder      the run folder and the trackers
.build            the model: loaded, quantised, adapted; the activation policy
.compile          data loader, compile plan, step; warm-up, capture; the state that a resume needs
"""

import gc
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from launcher.checkpoint.adapter import adapter_digest
from launcher.checkpoint.folder import RunFolder, default_folder
from launcher.compile.graphs import CaptureFailed, check_graphs, outcome
from launcher.compile.observe import Observer
from launcher.compile.plan import Plan
from launcher.data.loader import StreamLoader, TrainLoader, eval_batches, sample_batch, train_loader
from launcher.data.pack.micro_batch import MicroBatch
from launcher.data.prepare import PreparedData
from launcher.data.prepare import prepare as prepare_data
from launcher.data.stream import Stream
from launcher.errors import ContractError, DataError, LauncherError, RecipeError
from launcher.memory.forecast import Shapes
from launcher.memory.ledger import Ledger
from launcher.memory.offload import HostInputs
from launcher.memory.policy import Policy, applied, check_policy, choose_policy
from launcher.model.attention import BlockFacts
from launcher.model.build import BuiltModel, build_model, preflight
from launcher.model.load import load_config, load_tokenizer
from launcher.recipe.schema import TrainSection
from launcher.runtime.clock import Clock
from launcher.runtime.first_rank import one_rank_first
from launcher.runtime.ranks import RankInfo, broadcast, check_same_on_all_ranks, gather, hold_process_group
from launcher.train.optim import check_optimizer, gates_on_device
from launcher.train.regions import regions_of
from launcher.train.request import Request
from launcher.train.state import TrainState, run_identity
from launcher.train.step import TrainStep


@dataclass(frozen=True)
class Prepared:
    """What a run knows before it touches weights."""

    config: Any
    tokenizer: Any
    data: PreparedData
    device: torch.device


def prepare_inputs(request: Request) -> Prepared:
    """Check the recipe against model and device, and prepare the data: one process of each machine first, the others
    from its cache.

    Raises RecipeError (2) and DataError (3); writes nothing but caches.
    """
    recipe, source, device = request.recipe, request.source, choose_device(request.rank_info)
    config = load_config(source, recipe.model)
    preflight(recipe, source, config, device)
    check_optimizer(recipe.train, device)
    check_graphs(recipe.compile, device)
    check_policy(recipe, device)
    tokenizer = load_tokenizer(source, recipe.model, stand_in=request.shipped / "tiny" / "base")
    data = one_rank_first(
        request.rank_info,
        lambda: prepare_data(recipe.data, tokenizer, seed=recipe.train.seed),
        wait_s=recipe.data.wait_s,
    )
    return Prepared(config, tokenizer, data, device)


def choose_device(rank_info: RankInfo) -> torch.device:
    """This process's own GPU; the CPU where there is none or Accelerate is told to use it. Raises RecipeError when
    there are fewer GPUs than processes."""
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    processes, gpus = rank_info.local_world_size, torch.cuda.device_count()
    if processes > gpus:
        raise RecipeError(
            f"every process needs a GPU of its own; {processes} were started on {gpus} GPU(s). "
            f"Launch with --num_processes {gpus}."
        )
    return torch.device("cuda", rank_info.local_rank)


def block_facts(data: PreparedData, *, micro_batch: int) -> BlockFacts:
    """What the prepared data tells the model. The later windows of a stream are laid out like the first, but of their
    targets nothing is known, and packed ones may hold several documents a block."""
    streamed = isinstance(data.train, Stream)
    sets = [data.first_blocks, *([data.validation] if data.validation else [])]
    bounds = [] if streamed else [blocks.max_targets(micro_batch) for blocks in sets]
    packed_later = isinstance(data.train, Stream) and data.train.data.batching == "packed"
    return BlockFacts(
        data.widths,
        alone=not packed_later and all(blocks.single_documents for blocks in sets),
        targets={width: max(bound.get(width, 0) for bound in bounds) for width in data.widths if bounds},
        max_seqlen=max(blocks.max_seqlen for blocks in sets),
    )


def total_steps(train: TrainSection, loader: TrainLoader | StreamLoader) -> int:
    """Optimizer steps of the run."""
    if train.steps is not None:
        return train.steps
    assert isinstance(loader, TrainLoader), "a recipe that streams has train.steps"
    return max(1, round((train.epochs or 0) * loader.steps_per_epoch))


class Worker:
    """One process's share of a run. Call open_folder, build and compile in this order; a proof needs no folder."""

    def __init__(self, request: Request, prepared: Prepared, *, clock: Clock) -> None:
        self.request, self.prepared, self.clock = request, prepared, clock
        self.recipe, self.rank_info = request.recipe, request.rank_info
        # Before the first compile: dynamo guards on the thread count, and launchers set it to 1 on CPUs.
        torch.set_num_threads(self.rank_info.cores)
        cpu = prepared.device.type == "cpu"
        PartialState(cpu=cpu)  # the process group first: the run folder's name is rank 0's
        hold_process_group()
        folder = broadcast(self.recipe.run.output_dir or default_folder(request.name))
        self.folder = RunFolder(Path(folder).absolute())
        self.accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no",  # casts are explicit
            dynamo_backend="no",  # compile/plan.py is the one owner
        )
        # Ranks never exchange token counts or steps: each knows them, since all pack the same data. Make sure of that.
        known = self.recipe.train.model_dump_json() + prepared.data.identity
        check_same_on_all_ranks(
            "read the same data and recipe",
            hashlib.sha256(known.encode()).hexdigest(),
            error=DataError,
            remedy="Give every process the same command line, and the same files on every machine.",
        )
        self.observer = Observer()
        self.ledger = Ledger(self.accelerator.device)

    def release(self) -> None:
        """Let other code of this process compile again, however far this worker has come."""
        if "plan" in vars(self):
            self.plan.release()

    def open_folder(self) -> None:
        """Create the run folder on rank 0. Every rank raises the error that rank 0 met."""
        problem: LauncherError | None = None
        if self.rank_info.is_main:
            try:
                self.folder.create()
            except LauncherError as error:
                problem = error
        problem = broadcast(problem)
        if problem is not None:
            raise problem

    def build(self) -> BuiltModel:
        """Load, quantise and adapt the model, and choose what its forward pass keeps; the ledger notes each phase."""
        self.ledger.mark("before load")
        self.built = build_model(
            self.recipe,
            self.request.source,
            self.prepared.config,
            device=self.accelerator.device,
            blocks=block_facts(self.prepared.data, micro_batch=self.recipe.train.micro_batch),
            phase=self.ledger.mark,
        )
        if self.rank_info.world_size > 1:  # ranks exchange only gradients: those that begin differently stay different
            check_same_on_all_ranks(
                "start from the same adapter",
                adapter_digest(self.built.packed),
                error=ContractError,
                remedy="Run the same versions of torch and peft on the same kind of device on every rank.",
            )
        self.policy = self._activation_policy()
        self.host_inputs = None
        if self.policy.kept.on_host:
            body = self.built.packed.body
            self.host_inputs = HostInputs(len(body.layers), self.accelerator.device)
            body.around = self.host_inputs.around
        return self.built

    def _activation_policy(self) -> Policy:
        """As the recipe asks; `auto` by the free memory of the run's fullest GPU, so that all ranks choose the same."""
        width = max(self.prepared.data.widths)
        free = gather(self.ledger.free_mib())
        return choose_policy(
            self.recipe,
            Shapes(
                tokens=self.recipe.train.micro_batch * width,
                masked=width if self.built.attention == "sdpa" else 0,
                **self.built.sizes(),
            ),
            held_mib=self.ledger.used_mib(),
            free_mib=None if None in free else min(free),
        )

    def compile(self) -> None:
        """Make the loaders, the compile plan and the step; compile every planned graph, wait for the other ranks, let
        no further compilation pass, and capture."""
        self._make_loaders()
        self._make_step()
        samples = [self._sample(width) for width in self.prepared.data.widths]
        self.probe = max(samples, key=lambda batch: batch.supervised_tokens)
        with applied(self.policy):
            self.plan.warm_up(lambda: self.step.rehearse(samples))
        self.accelerator.wait_for_everyone()
        self.plan.arm()
        self.ledger.mark("after compile")
        self.cuda_graphs = self._capture(samples)
        # LoRA dropout differs by rank; and it must not depend on what warm-up and capture have drawn.
        torch.manual_seed(self.recipe.train.seed + self.rank_info.rank)

    def _make_loaders(self) -> None:
        train, data, rank_info = self.recipe.train, self.prepared.data, self.rank_info
        share: Any = {"micro_batch": train.micro_batch, "rank": rank_info.rank, "world_size": rank_info.world_size}
        self.batches = train_loader(data.train, accumulation=train.accumulation, seed=train.seed, **share)
        self.eval_batches = eval_batches(data.validation, **share) if data.validation else []
        self.steps = total_steps(train, self.batches)

    def _make_step(self) -> None:
        """The compile plan, the step that it compiles, and the state that a resume needs of both step and loader."""
        built, data = self.built, self.prepared.data
        regions = regions_of(built, shapes=len(data.widths))
        self.plan = Plan(regions, compile=self.recipe.compile, observer=self.observer)
        self.step = TrainStep(
            built.packed,
            self.recipe.train,
            steps=self.steps,
            plan=self.plan,
            accelerator=self.accelerator,
            fp16=built.dtype == torch.float16,
        )
        dtype, processes = str(built.dtype).removeprefix("torch."), self.rank_info.world_size
        identity = run_identity(self.recipe, data=data.identity, steps=self.steps, dtype=dtype, processes=processes)
        self.state = TrainState(self.step, self.batches, identity=identity, rank=self.rank_info.rank)

    def _sample(self, width: int) -> MicroBatch:
        """A micro batch of blocks of this width: of training data, else of validation data."""
        train, validation = self.prepared.data.first_blocks, self.prepared.data.validation
        blocks = train if validation is None or width in train.shapes else validation
        return sample_batch(blocks, width, micro_batch=self.recipe.train.micro_batch)

    def _capture(self, samples: list[MicroBatch]) -> str:
        """Capture the step where the recipe and the device allow it; returns what StartRecord.cuda_graphs says.

        Raises ContractError, on every rank, where compile.cuda_graphs=on and one of them could not.
        """
        wanted, device = self.recipe.compile.cuda_graphs, self.accelerator.device
        if wanted == "off" or device.type != "cuda":
            return "off (as asked)" if wanted == "off" else f"off (the device is {device.type.upper()})"
        failure, install = None, None
        with self.clock.phase("capture"):
            try:
                install = self.step.capture(samples)
            except CaptureFailed as error:
                failure = str(error)
            if failure is not None:  # after the except block, whose error holds the memory of the attempt
                gc.collect()
                torch.cuda.empty_cache()
        self.ledger.mark("after capture")
        result = outcome(gather(failure), wanted=wanted)
        if result == "on" and install is not None:  # on every rank or on none
            install()
            if not gates_on_device(self.step.optimizer):
                return f"on, but for the update of {self.recipe.train.optimizer}"
        return result
