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
    """Everything in a tree of dicts that is no dict, by dotted name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else key)
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

    def named(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: named(inner, f"{name}.{key}" if name else key) for key, inner in value.items()}
        return {"tensor": name} if isinstance(value, Tensor) else value

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value["tensor"]] if list(value) == ["tensor"] else {k: filled(v) for k, v in value.items()}
        return value

    return filled(json.loads(json.dumps(named(state))))
