"""What is planned before the first step: how many steps, which shapes, which regions are compiled for them."""

from typing import Any

from launcher.compile.regions import Region
from launcher.data.loader import StreamLoader, TrainLoader
from launcher.data.prepare import PreparedData
from launcher.data.stream import Stream
from launcher.memory.policy import Shapes
from launcher.model.attention import CORES, Rows, register_attention
from launcher.model.build import BuiltModel
from launcher.model.families import head_width, layer_mlps, layer_norms
from launcher.model.lora import ADAPTER
from launcher.ops.linear_ce import chunk_loss, chunk_loss_and_grad
from launcher.recipe.schema import TrainSection


def total_steps(train: TrainSection, loader: TrainLoader | StreamLoader) -> int:
    """Optimizer steps of the run."""
    if train.steps is not None:
        return train.steps
    assert isinstance(loader, TrainLoader), "a recipe that streams has train.steps"
    return max(1, round((train.epochs or 0) * loader.steps_per_epoch))


def planned_widths(data: PreparedData) -> list[int]:
    """The row widths of training and validation: each is a planned shape. Longest first: warm-up then begins with the
    call that needs the most memory."""
    both = {*data.first_blocks.shapes, *(data.validation.shapes if data.validation else ())}
    return sorted(both, reverse=True)


def rows_of(data: PreparedData, *, micro_batch: int) -> Rows:
    """What the model may know of its rows. A stream's later windows are as its batching makes them, and of their
    targets nothing is known."""
    sets = [data.first_blocks] + ([data.validation] if data.validation else [])
    widths, streamed = planned_widths(data), isinstance(data.train, Stream)
    packs = isinstance(data.train, Stream) and data.train.data.batching == "packed"
    bounds = [] if streamed else [blocks.most_targets(micro_batch) for blocks in sets]
    return Rows(
        tuple(widths),
        alone=not packs and all(blocks.alone for blocks in sets),
        targets={width: max(bound.get(width, 0) for bound in bounds) for width in widths if bounds},
        max_seqlen=max(blocks.max_seqlen for blocks in sets),
    )


def shapes_of(built: BuiltModel, *, micro_batch: int, width: int) -> Shapes:
    """What a micro batch of rows of `width` positions keeps is told by these."""
    config: Any = built.peft.config
    head = head_width(config)
    lora: Any = built.peft.peft_config[ADAPTER]
    adapted: list[Any] = [module for module in built.packed.body.layers[0].modules() if hasattr(module, "lora_A")]
    return Shapes(
        layers=config.num_hidden_layers,
        tokens=micro_batch * width,
        hidden=config.hidden_size,
        query=config.num_attention_heads * head,
        key_value=config.num_key_value_heads * head,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        loss_chunk=built.packed.loss_chunk,
        itemsize=built.dtype.itemsize,
        trainable=built.trainable,
        dropped=sum(module.in_features for module in adapted) if lora.lora_dropout else 0,
    )


def regions_of(built: BuiltModel, *, shapes: int) -> list[Region]:
    """The regions of a built model that a compile plan may choose from: each is called in training and evaluation with
    every one of the planned `shapes`, but the loss, whose chunks have one size."""
    packed, losses = built.packed, built.packed.loss_functions
    path = built.attention
    return [
        Region("layer", 2 * shapes, modules=tuple(packed.body.layers)),
        Region("body", 2 * shapes, modules=(packed.body,)),
        Region("mlp", 2 * shapes, modules=layer_mlps(built.family, packed.body)),
        Region("rmsnorm", 2 * shapes, modules=layer_norms(built.family, packed.body)),
        Region("attention", 2 * shapes, function=CORES[path], install=lambda f: register_attention(path, f)),
        Region("loss", 1, function=chunk_loss_and_grad, install=lambda f: setattr(losses, "loss_and_grad", f)),
        Region("loss", 1, function=chunk_loss, install=lambda f: setattr(losses, "loss", f)),
    ]
