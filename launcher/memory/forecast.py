"""Forecasts the peak memory of a training step from the model's sizes and what the layers keep.

Letters: N tokens of a micro batch, S positions of a block, D model width, F feed-forward width, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

from launcher.memory.ledger import MIB
from launcher.memory.offload import INPUTS_ON_DEVICE


@dataclass(frozen=True)
class Shapes:
    """The sizes that decide how much memory a micro batch takes."""

    layers: int
    tokens: int  # N
    hidden: int  # D
    query: int  # query heads times head width
    key_value: int  # key-value heads times head width
    intermediate: int  # F
    vocabulary: int  # V
    loss_chunk: int  # tokens whose logits live at once
    itemsize: int  # bytes of the compute dtype
    trainable: int  # parameters
    repeated: int = 0  # features by which keys and values grow where each is repeated for its group of query heads
    masked: int = 0  # S, where attention reads [S, S] masks of the compute dtype
    masks: int = 1  # of them
    logit_bytes: int = 0  # of a logit of a loss chunk, where that is not `itemsize`
    scores: int = 0  # query heads, where attention keeps their [S, S] scores
    state: float = 8.0  # bytes of optimizer state a trained parameter; adamw's
    by_adapters: int = 0  # features that a layer's adapters keep besides (model/sizes.py)


class Kept(NamedTuple):
    """What is kept for the backward pass: the partitioner's settings, and where the layers' inputs wait."""

    budget: float  # fraction of what the partitioner would keep by default
    elementwise: bool  # whether it keeps elementwise results that the backward pass reads
    on_host: bool = False


KEEP_ALL = Kept(1.0, True)


def optimizer_bytes(optimizer: str, rank: int) -> float:
    """Bytes of state that an optimizer keeps for a parameter of adapters of `rank`. Of a matrix with fewer than 4,096
    numbers bitsandbytes keeps the state in fp32 in any case."""
    if optimizer == "adafactor":
        return 4 / rank  # an average for each row and each column, fp32; of [rank, n] the columns decide
    moments = 2 if "adamw" in optimizer else 1
    return moments * (1 + 4 / 256 if optimizer.endswith("8bit") else 4)  # of 8 bits: a scale for 256 numbers


def forecast(shapes: Shapes, kept: Kept, *, held_mib: float) -> float:
    """Peak MiB of a training step: the `held_mib` of weights and adapters, gradients and optimizer state of the
    adapters, what the layers keep on the device, and the temporaries of the loss or of one layer's backward pass,
    whichever are larger."""
    s = shapes
    column = s.itemsize * s.tokens / MIB  # MiB of one number per token
    # The feed-forward block: its input's gradient, h, incoming and outgoing gradients; gate and up dequantised.
    work = (3 * s.intermediate + 2 * s.hidden) * column + 2 * s.intermediate * s.hidden * s.itemsize / MIB
    if kept.budget < 1:
        work += _layer_mib(s, KEEP_ALL) - _layer_mib(s, kept)  # of the layer that is being recomputed
    loss = s.loss_chunk * s.vocabulary * (s.logit_bytes or s.itemsize) / MIB + 3 * s.hidden * column
    adapters = (2 * 4 + s.state) * s.trainable / MIB  # summed gradients, those of this pass, fp32; optimizer state
    return held_mib + adapters + layers_mib(s, kept) + s.masks * s.masked * column + max(work, loss)


def layers_mib(shapes: Shapes, kept: Kept) -> float:
    """MiB that the layers keep on the device for the backward pass."""
    layers = min(shapes.layers, INPUTS_ON_DEVICE) if kept.on_host else shapes.layers
    return layers * _layer_mib(shapes, kept)


def _layer_mib(s: Shapes, kept: Kept) -> float:
    """MiB that one layer keeps for the backward pass."""
    # Its input, the sum after attention, attention's inputs and output, gate and up; then the norms' outputs, and the
    # repeated keys and values, which are computed again where elementwise results are.
    selective = 2 * s.hidden + 2 * s.query + 2 * s.key_value + 2 * s.intermediate + s.by_adapters
    selective += 2 * s.scores * s.masked  # capped, and as weights
    most = selective + (2 * s.hidden + s.repeated if kept.elementwise else 0)
    return (s.hidden + kept.budget * (most - s.hidden)) * s.itemsize * s.tokens / MIB
