"""Everything before the first step. Split in two by cost and by consequence:

`prepare` reads the model's config and tokenizer and packs the data: it finds every fault of recipe and data before the
process group, the run folder or the weights exist. `Worker` then builds the model, compiles it and warms it up.
"""

import gc
import hashlib
import importlib.util
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState

from launcher.checkpoint.folder import RunFolder, default_folder
from launcher.compile.graphs import CaptureFailed, check_graphs, outcome
from launcher.compile.observe import Observer
from launcher.compile.plan import Plan
from launcher.data.loader import MicroBatch, eval_batches, sample_batch, train_loader
from launcher.data.prepare import PreparedData
from launcher.data.prepare import prepare as prepare_data
from launcher.errors import ContractError, DataError, LauncherError, RecipeError
from launcher.memory.ledger import Ledger
from launcher.memory.offload import HostInputs
from launcher.memory.policy import Policy, applied, check_policy, choose_policy
from launcher.model.build import BuiltModel, build_model, preflight
from launcher.model.source import load_config, load_tokenizer
from launcher.recipe.schema import RunSection
from launcher.runtime.agreement import check_alike, digest_of
from launcher.runtime.ranks import broadcast, gather, hold_process_group, local_rank_0_first
from launcher.train.optim import check_optimizer, gates_on_device
from launcher.train.planned import planned_widths, regions_of, rows_of, shapes_of, total_steps
from launcher.train.request import Request
from launcher.train.step import TrainStep


class Clock:
    """Seconds by phase, in order; phases of the same name add up. A phase within another does not count for both."""

    def __init__(self) -> None:
        self.elapsed_s: dict[str, float] = {"imports": time.time() - psutil.Process().create_time()}
        self._within_s = 0.0  # of phases that have ended within the present one

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before_s, self._within_s = self._within_s, 0.0
        self.elapsed_s.setdefault(name, 0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            took_s = time.perf_counter() - start
            self.elapsed_s[name] += took_s - self._within_s
            self._within_s = before_s + took_s


@dataclass(frozen=True)
class Prepared:
    """What a run knows before it touches weights."""

    config: Any
    tokenizer: Any
    data: PreparedData
    device: torch.device


def prepare(request: Request) -> Prepared:
    """Check what the recipe asks of the model; prepare the data, local rank 0 first, the others from its cache.

    Raises RecipeError (2) and DataError (3); writes nothing.
    """
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    cuda = torch.cuda.is_available() and not use_cpu
    started, gpus = request.rank_info.local_world_size, torch.cuda.device_count()
    if cuda and started > gpus:
        raise RecipeError(
            f"every process needs a GPU of its own; {started} were started on {gpus} GPU(s). "
            f"Launch with --num_processes {gpus}."
        )
    device = torch.device("cuda", request.rank_info.local_rank) if cuda else torch.device("cpu")
    recipe, source = request.recipe, request.source
    config = load_config(source, recipe.model)
    preflight(recipe, source, config, device)
    check_optimizer(recipe.train, device)
    check_graphs(recipe.compile, device)
    check_policy(recipe, device)
    check_trackers(recipe.run)
    tokenizer = load_tokenizer(source, recipe.model, stand_in=request.shipped / "tiny" / "base")
    data = local_rank_0_first(
        request.rank_info,
        lambda: prepare_data(recipe.data, tokenizer, seed=recipe.train.seed),
        wait_s=recipe.data.wait_s,
    )
    return Prepared(config, tokenizer, data, device)


def check_trackers(run: RunSection) -> None:
    """Raise RecipeError for a tracker that is not installed: Accelerate would leave it out without a word."""
    missing = [name for name in run.trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"run.trackers must be installed; {', '.join(missing)} is not. pip install '.[trackers]'")


class Worker:
    """One process's share of a run, built in steps, each a method so that the loop can time and announce it."""

    def __init__(self, request: Request, prepared: Prepared, *, clock: Clock) -> None:
        self.request, self.prepared, self.clock = request, prepared, clock
        self.recipe, self.rank_info = recipe, place = request.recipe, request.rank_info
        # Before the first compile: the thread count is guarded on, and launchers set it to 1 on CPUs.
        torch.set_num_threads(place.cores)
        cpu = prepared.device.type == "cpu"
        PartialState(cpu=cpu)  # the process group first: trackers want a folder, and its name is rank 0's
        hold_process_group()
        self.folder = RunFolder(Path(broadcast(recipe.run.output_dir or default_folder(request.name))).absolute())
        self.accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no",  # casts are explicit
            dynamo_backend="no",  # compile/plan.py is the one owner
            log_with=list(recipe.run.trackers) or None,
            project_dir=str(self.folder.path),
        )
        # Token counts and steps are not exchanged but known, as every rank packs the same data: make sure of it.
        known = recipe.train.model_dump_json() + prepared.data.identity
        check_alike(
            "read the same data and recipe",
            hashlib.sha256(known.encode()).hexdigest(),
            error=DataError,
            remedy="Give every process the same command line, and the same files on every machine.",
        )
        self.observer = Observer()
        self.ledger = Ledger(self.accelerator.device)

    def build(self) -> BuiltModel:
        """Load, quantise, adapt; the ledger gets a record after each."""
        self.ledger.mark("before load")
        self.built = build_model(
            self.recipe,
            self.request.source,
            self.prepared.config,
            device=self.accelerator.device,
            rows=rows_of(self.prepared.data, micro_batch=self.recipe.train.micro_batch),
            phase=self.ledger.mark,
        )
        if self.rank_info.world_size > 1:  # only gradients are exchanged: ranks that begin apart stay apart
            check_alike(
                "start from the same adapter",
                digest_of(self.built.packed),
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

    def compile(self) -> None:
        """Apply the plan, compile every planned graph, check the count, wait for the others, arm, capture."""
        train, built, data = self.recipe.train, self.built, self.prepared.data
        widths = planned_widths(data)
        regions = regions_of(built, shapes=len(widths))
        self.plan = Plan(regions, compile=self.recipe.compile, observer=self.observer)
        self.batches = train_loader(
            data.train,
            micro_batch=train.micro_batch,
            accumulation=train.accumulation,
            rank=self.rank_info.rank,
            world_size=self.rank_info.world_size,
            seed=train.seed,
        )
        self.steps = total_steps(train, self.batches)
        self.eval_batches = self._eval_batches()
        self.step = TrainStep(
            built.packed,
            train,
            steps=self.steps,
            plan=self.plan,
            accelerator=self.accelerator,
            fp16=built.dtype == torch.float16,
        )
        self._samples = [self._sample(width) for width in widths]
        self.probe = max(self._samples, key=lambda batch: batch.supervised_tokens)
        with applied(self.policy):
            self.plan.warm_up(lambda: self.step.rehearse(self._samples))
        self.accelerator.wait_for_everyone()
        self.plan.arm()
        self.ledger.mark("after compile")
        self.cuda_graphs = self._capture()
        torch.manual_seed(train.seed + self.rank_info.rank)  # LoRA dropout differs by rank, and from warm-up

    def _activation_policy(self) -> Policy:
        """As the recipe asks; `auto` by what the fullest card of the run has free, so that all ranks choose alike."""
        free = gather(self.ledger.free_mib())
        widest = max(planned_widths(self.prepared.data))
        shapes = shapes_of(self.built, micro_batch=self.recipe.train.micro_batch, width=widest)
        least = None if None in free else min(mib for mib in free if mib is not None)
        return choose_policy(self.recipe, shapes, held_mib=self.ledger.used_mib(), free_mib=least)

    def open_folder(self) -> None:
        """Create the run folder (rank 0) and start the trackers. Every rank raises what rank 0 met."""
        problem: LauncherError | None = None
        if self.rank_info.is_main:
            try:
                self.folder.create()
            except LauncherError as error:
                problem = error
        problem = broadcast(problem)
        if problem is not None:
            raise problem
        self.folder.is_ours = True
        if self.recipe.run.trackers:
            self.accelerator.init_trackers("trackers")

    def _eval_batches(self) -> list[MicroBatch]:
        validation = self.prepared.data.validation
        if validation is None:
            return []
        return eval_batches(
            validation,
            micro_batch=self.recipe.train.micro_batch,
            rank=self.rank_info.rank,
            world_size=self.rank_info.world_size,
        )

    def _sample(self, width: int) -> MicroBatch:
        train, validation = self.prepared.data.first_blocks, self.prepared.data.validation
        blocks = train if validation is None or width in train.shapes else validation
        return sample_batch(blocks, width, micro_batch=self.recipe.train.micro_batch)

    def _capture(self) -> str:
        """Capture the step where the recipe and the device allow it; returns what StartRecord.cuda_graphs says.

        Raises ContractError, on every rank, where compile.cuda_graphs=on and one of them could not.
        """
        wanted, device = self.recipe.compile.cuda_graphs, self.accelerator.device
        if wanted == "off" or device.type != "cuda":
            return "off (as asked)" if wanted == "off" else f"off (the device is {device.type.upper()})"
        failure, install = None, None
        with self.clock.phase("capture"):
            try:
                install = self.step.capture(self._samples)
            except CaptureFailed as error:
                failure = str(error)
            if failure is not None:  # only now does nothing hold what the attempt had in memory
                gc.collect()
                torch.cuda.empty_cache()
        self.ledger.mark("after capture")
        found = outcome(gather(failure), wanted=wanted)
        if found == "on" and install is not None:  # on every rank or on none
            install()
        apart = found == "on" and not gates_on_device(self.step.optimizer)
        return f"on, but for the update of {self.recipe.train.optimizer}" if apart else found
