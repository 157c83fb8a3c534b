"""Everything before the first step, in the order in which it happens.

prepare_inputs    what is known without weights (inputs.py)
Worker            the process group; every rank has read the same; the data loader
.open_folder      the run folder, and what the run goes on from
.build            the model: loaded, quantised, adapted; the activation policy
.compile          compile plan, step; warm-up, capture; the state that a resume needs
"""

import gc
import hashlib
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from launcher.checkpoint.adapter import adapter_digest, saved_parameters
from launcher.checkpoint.folder import RunFolder, default_folder, named_folder
from launcher.checkpoint.parts import parts_of
from launcher.checkpoint.resume import Resumed, cut_back, open_folder
from launcher.compile.graphs import CaptureFailed, outcome
from launcher.compile.observe import Observer
from launcher.compile.plan import Plan
from launcher.credentials import masked_tree
from launcher.data.loader import eval_batches, sample_batch, train_loader
from launcher.data.pack.micro_batch import MicroBatch
from launcher.errors import CheckpointError, ContractError, DataError, LauncherError, RecipeError
from launcher.memory.forecast import Shapes, optimizer_bytes
from launcher.memory.ledger import Ledger
from launcher.memory.offload import HostInputs
from launcher.memory.policy import Policy, applied, choose_policy
from launcher.model.attention import MASKED
from launcher.model.build import BuiltModel, build_model, choose_dtype
from launcher.model.token_vectors import untrained_notes
from launcher.model.weight_files import read_headers
from launcher.model.weight_values import base_digest
from launcher.recipe.lora_section import COMPUTED_STARTS
from launcher.records.run import Verdict
from launcher.runtime.clock import Clock
from launcher.runtime.ranks import (
    broadcast,
    check_same_on_all_ranks,
    failing_together,
    gather,
    hold_process_group,
)
from launcher.runtime.rendezvous import wait_for_ranks
from launcher.train.adapter_start import same_start, start_adapter
from launcher.train.compiled_regions import regions_of
from launcher.train.determinism import use_deterministic_kernels
from launcher.train.inputs import Prepared, block_facts, total_steps
from launcher.train.optim import gates_on_device
from launcher.train.request import Request
from launcher.train.reshard import check_epochs, step_shape_of
from launcher.train.state import EarlyStop, TrainState, check_identity, check_layout, run_identity
from launcher.train.step import TrainStep


class Worker:
    """One process's share of a run. Call open_folder, build and compile in this order; a proof needs no folder."""

    def __init__(self, request: Request, prepared: Prepared, *, clock: Clock) -> None:
        self.request, self.prepared, self.clock = request, prepared, clock
        self.recipe, self.rank_info = request.recipe, request.rank_info
        # Before the first compile: dynamo guards on the thread count, and launchers set it to 1 on CPUs.
        torch.set_num_threads(self.rank_info.cores)
        cpu = prepared.device.type == "cpu"
        store = wait_for_ranks(self.rank_info, wait_s=self.recipe.data.wait_s)
        PartialState(cpu=cpu)  # the process group first: the run folder's name is rank 0's
        del store
        hold_process_group()
        run = self.recipe.run
        folder = broadcast(run.output_dir or named_folder(run.resume) or default_folder(request.name))
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
        self._make_loaders()
        self.resumed: Resumed | None = None
        self.start_verdicts: tuple[Verdict, ...] = ()  # of train/adapter_start.py and start.py
        self.observer = Observer()
        self.ledger = Ledger(self.accelerator.device)
        # Last: where anything above fails, nobody calls `release`.
        self._put_back = use_deterministic_kernels() if self.recipe.train.deterministic else None

    def release(self) -> None:
        """Let other code of this process compile again, however far this worker has come."""
        if "plan" in vars(self):
            self.plan.release()
        if self._put_back is not None:
            self._put_back()

    def open_folder(self) -> None:
        """Create the run folder on rank 0, or open it again and find what the run goes on from (`resumed`). Every rank
        raises the error that rank 0 met; no file has changed then."""
        resumed = None
        with failing_together(Exception):  # of the disk too: the others would wait
            if self.rank_info.is_main and (resumed := open_folder(self.folder, self.recipe.run.resume)):
                self._check_resumed(resumed)
                cut_back(self.folder, resumed)
        parts = parts_of(self.folder) if self.rank_info.is_main else []
        self.resumed, self.parts = broadcast((resumed, parts))

    def _check_resumed(self, resumed: Resumed) -> None:
        """Raise CheckpointError if this is not the run of the checkpoint, or if it has no steps left."""
        check_layout(resumed.state, step=resumed.step)
        saved, here = resumed.state["state"]["identity"], self._identity()
        check_identity(saved, here, allow_reshard=self.recipe.run.allow_reshard)
        check_epochs(saved, here, epochs=self.recipe.train.epochs)
        if (saved_by := step_shape_of(saved)) != step_shape_of(here):  # it may refuse, so before a file is cut
            self.batches.load_state_dict(resumed.state["state"]["loader"], saved_by=saved_by)
        patience = self.recipe.train.patience
        if self.folder.code == 0 and EarlyStop(**resumed.state["state"]["early_stop"]).reached(patience):
            raise CheckpointError(
                f"a run goes on only if it has steps left; the one in {self.folder.path} has ended early, after "
                f"{patience} evaluations without a lower eval loss.\nRaise train.patience, or choose another "
                "run.output_dir."
            )
        if resumed.step > self.steps or (resumed.step == self.steps and self.folder.code == 0):
            raise CheckpointError(
                f"a run goes on only if it has steps left; the one in {self.folder.path} has done {resumed.step} of "
                f"{self.steps}.\nRaise train.steps, or choose another run.output_dir."
            )

    def _identity(self) -> dict[str, Any]:
        dtype = str(choose_dtype(self.recipe.model.dtype, self.prepared.device)).removeprefix("torch.")
        data, processes = self.prepared.data.content, self.rank_info.world_size
        return dict(masked_tree(run_identity(self.recipe, data=data, dtype=dtype, processes=processes, **self._base)))

    @cached_property
    def _base(self) -> dict[str, str]:
        """The identity of the base's weights, which another revision may change under the same name; none of random
        ones. What is not in the local cache yet is downloaded."""
        if self.recipe.model.init == "random":
            return {}
        headers = read_headers(self.request.source, self.recipe.model.revision, download=True)
        return {"base": base_digest(headers or {})[:16]}

    def build(self) -> BuiltModel:
        """Load, quantise and adapt the model, and choose what its forward pass keeps; the ledger notes each phase."""
        self.ledger.mark("before load")
        with failing_together(LauncherError):  # a base that is not what its files hold
            self.built = build_model(
                self.recipe,
                self.request.source,
                self.prepared.config,
                device=self.accelerator.device,
                blocks=block_facts(self.prepared.data, micro_batch=self.recipe.train.micro_batch),
                phase=self.ledger.mark,
                token_ids=self.prepared.token_ids,
            )
            if self.resumed is None:  # else the checkpoint has the weights
                begun = start_adapter(self.built, self.request, self.prepared.data, clock=self.clock)
                self.start_verdicts, notes = begun
                self.built = replace(self.built, notes=(*self.built.notes, *notes))
        if self.rank_info.world_size > 1:  # ranks exchange only gradients: those that begin differently stay different
            if self.recipe.lora.starts_from_weights or self.recipe.lora.init in COMPUTED_STARTS:
                same_start(saved_parameters(self.built.packed).values())
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
        self.untrained_notes = self._untrained_notes()
        return self.built

    def _untrained_notes(self) -> tuple[str, ...]:
        if self.recipe.model.init == "random":  # nothing is trained
            return ()
        model, tokenizer, used = self.built.packed, self.prepared.tokenizer, self.prepared.used_ids
        return untrained_notes(
            model.embed.weight, model.head.weight, tokenizer, **vars(used.without(self.prepared.token_ids))
        )

    def _activation_policy(self) -> Policy:
        """As the recipe asks; `auto` by the free memory of the run's fullest GPU, so that all ranks choose the same."""
        width = max(self.prepared.data.widths)
        free = gather(self.ledger.free_mib())
        return choose_policy(
            self.recipe,
            Shapes(
                tokens=self.recipe.train.micro_batch * width,
                masked=width if self.built.attention in MASKED else 0,
                state=optimizer_bytes(self.recipe.train.optimizer, self.recipe.lora.r),
                **self.built.sizes(),
            ),
            held_mib=self.ledger.used_mib(),
            free_mib=None if None in free else min(free),
        )

    def compile(self) -> None:
        """Make the compile plan and the step; compile every planned graph, wait for the other ranks, let
        no further compilation pass, and capture."""
        self._make_step()
        samples = [self._sample(width) for width in self.prepared.data.widths]
        self.probe = max(samples, key=lambda batch: batch.supervised_tokens)
        self.plan.warm_up(lambda: self.step.rehearse(samples))
        self.accelerator.wait_for_everyone()
        self.plan.arm()
        self.ledger.mark("after compile")
        self.cuda_graphs = self._capture(samples)
        # LoRA dropout differs by rank; and it must not depend on what warm-up and capture have drawn.
        torch.manual_seed(self.recipe.train.seed + self.rank_info.rank)

    def compile_progress(self) -> str:
        """Graphs handed to the backend so far, of those planned, by region: "graphs: layer 1 of 2, loss 0 of 2"."""
        begun, planned = self.observer.graphs_by_region(), self.observer.expected
        counts = ", ".join(f"{region} {begun.get(region, 0)} of {count}" for region, count in planned.items())
        return f"graphs: {counts}" if counts else ""

    def _make_loaders(self) -> None:
        train, data, rank_info = self.recipe.train, self.prepared.data, self.rank_info
        share: Any = {"micro_batch": train.micro_batch, "rank": rank_info.rank, "world_size": rank_info.world_size}
        self.batches = train_loader(data.train, accumulation=train.accumulation, seed=train.seed, **share)
        self.eval_batches = eval_batches(data.validation, **share) if data.validation else None
        self.steps = total_steps(train, self.batches)
        if self.eval_batches is None and (wanting := "patience" if train.patience else train.keep_best and "keep_best"):
            raise RecipeError(
                f"train.{wanting} compares eval losses; no row validates. Raise data.validation (now "
                f"{self.recipe.data.validation}) or name validation data, or leave train.{wanting} out."
            )

    def _make_step(self) -> None:
        """The compile plan, the step that it compiles, and the state that a resume needs of both step and loader."""
        built, data = self.built, self.prepared.data
        regions = regions_of(built, shapes=len(data.widths))
        self.plan = Plan(
            regions,
            compile=self.recipe.compile,
            observer=self.observer,
            settings=partial(applied, self.policy),
        )
        self.step = TrainStep(
            built.packed,
            self.recipe.train,
            steps=self.steps,
            plan=self.plan,
            accelerator=self.accelerator,
            fp16=built.dtype == torch.float16,
        )
        self.state = TrainState(
            self.step,
            self.batches,
            identity=self._identity(),
            rank=self.rank_info.rank,
            allow_reshard=self.recipe.run.allow_reshard,
        )

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
