"""What a run knows without weights: config, tokenizer, data, device.

Finds every fault of recipe and data before the process group, the run folder or the weights exist.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from launcher.compile.graphs import check_graphs
from launcher.data.chat.stops import stops_of_answers
from launcher.data.loader import StreamLoader, TrainLoader
from launcher.data.occurrences import with_occurrences
from launcher.data.prepare import PreparedData
from launcher.data.prepare import prepare as prepare_data
from launcher.data.read.rows import ReadingProgress
from launcher.data.stream import Stream
from launcher.data.vocabulary import UsedIds, fit_vocabulary
from launcher.errors import RecipeError
from launcher.memory.policy import check_policy
from launcher.model.attention import BlockFacts
from launcher.model.build import check_model
from launcher.model.load import load_config, load_generation, load_stop_ids, load_tokenizer, stop_ids_of
from launcher.model.token_ids import token_ids_of
from launcher.recipe.train_section import TrainSection
from launcher.runtime.first_rank import one_rank_first
from launcher.runtime.ranks import (
    RankInfo,
)
from launcher.train.optim import check_optimizer
from launcher.train.request import Request


@dataclass(frozen=True)
class Prepared:
    """What a run knows before it touches weights."""

    config: Any
    tokenizer: Any
    data: PreparedData
    device: torch.device
    used_ids: UsedIds = UsedIds()
    token_ids: tuple[int, ...] = ()  # of lora.trainable_tokens
    model_stops: tuple[int, ...] = ()  # of the model's generation config

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens at which an answer of the trained model ends."""
        return frozenset(stops_of_answers(self.tokenizer, self.model_stops))


def prepare_inputs(request: Request, progress: ReadingProgress | None = None) -> Prepared:
    """Check the recipe against model and device, and prepare the data: one process of each machine first, the others
    from its cache.

    Raises RecipeError (2) and DataError (3); writes nothing but caches.
    """
    recipe, source, device = request.recipe, request.source, choose_device(request.rank_info)
    config = load_config(source, recipe.model)
    check_model(recipe, source, config, device)
    check_optimizer(recipe.train, device)
    check_graphs(recipe.compile, device)
    check_policy(recipe, device)
    tokenizer = load_tokenizer(source, recipe.model, stand_in=request.shipped / "tiny" / "base")
    token_ids = token_ids_of(recipe.lora.trainable_tokens, tokenizer, vocabulary=config.vocab_size)
    stop_ids = load_stop_ids(source, recipe.model)
    data = one_rank_first(
        request.rank_info,
        lambda: prepare_data(recipe.data, tokenizer, seed=recipe.train.seed, stop_ids=stop_ids, progress=progress),
        wait_s=recipe.data.wait_s,
    )
    data, used_ids = fit_vocabulary(data, tokenizer, vocabulary=config.vocab_size)
    data = with_occurrences(data, tokenizer, token_ids)
    model_stops = stop_ids_of(load_generation(source, recipe.model, config))
    return Prepared(config, tokenizer, data, device, used_ids, token_ids, tuple(model_stops))


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
