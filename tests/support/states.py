"""States of a run in tests: compared bit for bit, sent through the formats of files, and steps made between two."""

import json
from collections.abc import Iterator
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from launcher.train.setup import Worker


def train(worker: Worker, steps: int) -> list[list[float]]:
    """Make steps; returns loss, gradient norm, learning rate and skipped of each."""
    return [worker.step(next(worker.batches)).metrics.tolist() for _ in range(steps)]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a tree of dicts that is no dict, by dotted name. Raises TypeError where a key is no string."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (name and name + ".") + key)
    else:
        yield name, value


def flat(state: dict[str, Any]) -> dict[str, Any]:
    """Every leaf by its name; of tensors dtype, shape and bytes, so that == compares bits."""
    return {
        name: (str(leaf.dtype), tuple(leaf.shape), leaf.contiguous().numpy().tobytes())
        if isinstance(leaf, Tensor)
        else leaf
        for name, leaf in leaves(state)
    }


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    """The state as it comes back from a safetensors file and a JSON file."""
    tensors = load(save({name: leaf.clone() for name, leaf in leaves(state) if isinstance(leaf, Tensor)}))
    others = json.loads(json.dumps(state, default=lambda tensor: None))

    def filled(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: filled(inner, (name and name + ".") + key) for key, inner in value.items()}
        return tensors.get(name, value)

    return filled(others)
