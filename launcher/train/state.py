"""What a resumed worker needs: with a state loaded, its steps go on as if it had trained until there itself.

    identity     recipe, data and ranks: what must be equal in the run that goes on
    step         optimizer steps done
    training     what the step writes: adapters, optimizer, rates, loss scale, the flag of a non-finite step; and the
                 frozen start of the adapters, if they have one (model/lora_start.py)
    random       the random generators of every rank
    loader       the position in the data
    early_stop   the best eval loss, and the evaluations since

The training loop's own history is not in it: the records of earlier steps are in metrics.jsonl.

A state holds tensors (on the CPU), numbers, strings, lists and dicts: safetensors and JSON can keep it, without pickle.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launcher.data.loader import StreamLoader, TrainLoader
from launcher.errors import CheckpointError
from launcher.recipe.schema import Recipe
from launcher.records.run import RunPart
from launcher.runtime.ranks import gather
from launcher.train.host_copies import HostCopies
from launcher.train.reshard import RESHARD_KEYS, reshard_notes, seed_generators, step_shape_of
from launcher.train.schedule_free import set_counters
from launcher.train.step import TrainStep

STATE_KEYS = {"identity", "step", "training", "random", "loader", "early_stop"}
MAY_CHANGE = {  # keys of train, on a resume
    "steps", "epochs", "eval_every", "save_every", "keep", "log_every", "patience", "keep_best", "spike_patience",
}  # fmt: skip
MAX_DIFFERENCES = 5  # differences that a refusal names


@dataclass
class EarlyStop:
    """What early stopping remembers."""

    best_eval_loss: float | None = None
    evals_since_best: int = 0

    def update(self, eval_loss: float) -> None:
        if self.best_eval_loss is None or eval_loss < self.best_eval_loss:
            self.best_eval_loss, self.evals_since_best = eval_loss, 0
        else:
            self.evals_since_best += 1

    def reached(self, patience: int | None) -> bool:
        """Whether training ends early, by train.patience."""
        return patience is not None and self.evals_since_best >= patience


class TrainState:
    """The state of one process's run. `identity` is `run_identity`'s; `allow_reshard`: as run.allow_reshard."""

    def __init__(
        self,
        step: TrainStep,
        loader: TrainLoader | StreamLoader,
        *,
        identity: dict[str, Any],
        rank: int,
        allow_reshard: bool = False,
    ) -> None:
        self._step, self._loader, self._identity = step, loader, identity
        self._rank, self._allow_reshard = str(rank), allow_reshard
        self.early_stop = EarlyStop()
        self.notes: tuple[str, ...] = ()  # what the last load had to translate

    @property
    def step(self) -> int:
        """Optimizer steps done, those that fp16 skipped included."""
        return self._step.steps_done

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything. Every rank must call it, and gets the random states of all ranks. Waits for the
        device."""
        state, wait = self.begin_copy(HostCopies())
        wait()
        return state

    def begin_copy(self, copies: HostCopies) -> tuple[dict[str, Any], Callable[[], None]]:
        """As `state_dict`, but its tensors of a CUDA device are host memory of `copies` that the device still writes:
        read them after the function that is returned too, which any thread may call. Training may go on meanwhile.
        """
        live = self._step.live_state()
        self._wait()
        random_states = gather(random_state(self._step.device))
        state = {
            "identity": _copied(self._identity),
            "step": self.step,
            "training": _copied(live, copies),
            "random": {str(rank): state for rank, state in enumerate(random_states)},
            "loader": _copied(self._loader.state_dict()),
            "early_stop": {name: value for name, value in asdict(self.early_stop).items() if value is not None},
        }
        if self._step.device.type != "cuda":
            return state, lambda: None
        copied = torch.cuda.Event()
        copied.record()
        return state, copied.synchronize

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Tensors are written in place, as captured graphs read fixed addresses.

        Raises CheckpointError, before anything changes, for the state of another recipe, data or (unless allowed)
        number of ranks, and for one with missing or unknown parts, or with a position that the data does not have.
        """
        live = self._step.live_state()
        self._check(live, state)
        early_stop = EarlyStop(**state["early_stop"])
        saved_by = step_shape_of(state["identity"])
        left_out = self._loader.load_state_dict(state["loader"], saved_by=saved_by)  # may refuse, so before any tensor
        self._wait()
        _copy_into(live, state["training"])
        set_counters(self._step.optimizer, live.get("averages", {}))
        self._step.steps_done = state["step"]
        self.early_stop = early_stop
        new_ranks = [rank for rank in range(self._identity["processes"]) if str(rank) not in state["random"]]
        self.notes = reshard_notes(state["identity"], self._identity, left_out=left_out, new_ranks=new_ranks)
        if self._rank in state["random"]:
            set_random_state(state["random"][self._rank], self._step.device)  # last: nothing may draw after it
        else:
            seed_generators(self._identity["train.seed"], int(self._rank), self.step)
        self._wait()

    def _check(self, live: dict[str, Any], state: dict[str, Any]) -> None:
        check_identity(state.get("identity", {}), self._identity, allow_reshard=self._allow_reshard)
        expected = {"identity": {}, "step": 0, "training": live, "loader": {}}
        expected["random"] = random_state(self._step.device)
        expected["early_stop"] = {"best_eval_loss": 0.0, "evals_since_best": 0}
        found = {**state, "random": state.get("random", {}).get(self._rank)}
        if isinstance(found.get("early_stop"), dict):  # without a best loss before the first evaluation
            found["early_stop"] = {"best_eval_loss": 0.0, **found["early_stop"]}
        if int(self._rank) >= state["identity"]["processes"]:  # a new rank
            del expected["random"], found["random"]
        _refuse(list(_differences(expected, found, describe=_kind_of)))  # shapes and dtypes, whatever the values

    def _wait(self) -> None:
        """Paged optimizer state lies in memory that the host and the device share: neither may write while the other
        does."""
        if self._step.device.type == "cuda":
            torch.cuda.synchronize(self._step.device)


def check_layout(saved: dict[str, Any], *, step: int) -> None:
    """Raise CheckpointError for the content of a checkpoint that another version has written, or that is not of `step`,
    which its name says."""
    parts, of_part = saved.get("run", {}).get("parts"), {field.name for field in fields(RunPart)}
    known = isinstance(parts, list) and all(part.keys() == of_part for part in parts)
    if not known or saved.get("state", {}).keys() != STATE_KEYS or saved["run"].keys() != {"parts"}:
        raise CheckpointError(
            "a checkpoint must have been written by this version; this one has other parts.\n"
            "Go on with the version that wrote it, or start a new run."
        )
    if saved["state"]["step"] != step:
        raise CheckpointError(
            f"a checkpoint must keep its name; step-{step} holds step {saved['state']['step']}.\n"
            f"Rename it to step-{saved['state']['step']}, or remove it."
        )


def check_identity(saved: dict[str, Any], here: dict[str, Any], *, allow_reshard: bool) -> None:
    """Raise CheckpointError naming the keys by which a state is not one of this run."""
    changed = {key for key in RESHARD_KEYS if key in saved and saved[key] != here[key]}
    differences = list(_differences(here, saved, describe=_shortened))
    # The seed orders the blocks, and these keys make them: the data's digest differs too, and says nothing more.
    if any(line.startswith(("train.seed:", "data.", "model.")) for line in differences):
        differences = [line for line in differences if not line.startswith("data:")]
    if len(differences) > len(changed):
        _refuse(differences)
    elif not allow_reshard:
        _refuse(differences, "Set run.allow_reshard=true to go on all the same (docs/resume.md).\n")


def _refuse(differences: list[str], remedy: str = "") -> None:
    if differences:
        more = f"\n... and {len(differences) - MAX_DIFFERENCES} more" if len(differences) > MAX_DIFFERENCES else ""
        raise CheckpointError(
            "a run goes on only from a state of the same recipe, data and number of processes; these differ:\n"
            + "\n".join(differences[:MAX_DIFFERENCES])
            + f"{more}\n{remedy}Resume with the recipe and the data of the checkpoint, or start a new run."
        )


def run_identity(recipe: Recipe, **resolved: str | int) -> dict[str, Any]:
    """What decides the numbers of a run and the shapes of its state, by the recipe's keys: JSON values.

    `resolved`: what the recipe does not say by itself. That includes the identity of the prepared data, since sources
    are compared by content, not by path. The sections compile and memory change no state.
    """
    sections = {
        "model": recipe.model.model_dump(mode="json", include={"name", "revision", "init"}),
        "quant": recipe.quant.model_dump(mode="json"),
        "lora": recipe.lora.model_dump(mode="json"),
        "data": recipe.data.model_dump(mode="json", exclude={"sources", "validation", "wait_s"}),
        "train": recipe.train.model_dump(mode="json", exclude=MAY_CHANGE),
    }
    values = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    return {key: value for key, value in values.items() if value is not None} | resolved


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of this process's random generators: Python, numpy, torch, and torch on a CUDA device."""
    version, words, gauss = random.getstate()
    _, key, *rest = np.random.get_state(legacy=True)
    state = {
        "python": {"words": torch.tensor(words), "rest": [version] if gauss is None else [version, gauss]},
        "numpy": {"key": torch.from_numpy(np.asarray(key).astype(np.int64)), "rest": rest},
        "torch": torch.get_rng_state(),
    }
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    version, *gauss = state["python"]["rest"]
    random.setstate((version, tuple(state["python"]["words"].tolist()), gauss[0] if gauss else None))
    np.random.set_state(("MT19937", state["numpy"]["key"].numpy().astype(np.uint32), *state["numpy"]["rest"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _copied(value: Any, copies: HostCopies | None = None) -> Any:
    """The same tree of plain values, with its tensors copied to the CPU. With `copies`, those of a CUDA device are only
    enqueued."""
    on_device = [leaf for leaf in _tensors(value) if leaf.is_cuda] if copies else []
    enqueued = iter(copies.begin(on_device)) if copies and on_device else iter(())

    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copied(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [copied(inner) for inner in value]
        if not isinstance(value, Tensor):
            return value
        return next(enqueued) if copies and value.is_cuda else value.detach().to("cpu", copy=True)

    return copied(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a tree, in order."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from _tensors(inner)
    if isinstance(value, Tensor):
        yield value


def _copy_into(live: dict[str, Any], state: dict[str, Any]) -> None:
    """Write the values of `state` into the tensors of `live`, and its numbers in the place of those of `live`."""
    for key, value in state.items():
        if isinstance(value, dict):
            _copy_into(live[key], value)
        elif isinstance(value, Tensor):
            live[key].copy_(value)
        else:
            live[key] = value


def _differences(here: Any, state: Any, *, describe: Callable[[Any], str], name: str = "") -> Iterator[str]:
    """A line for every leaf of two trees that `describe` tells apart. An empty dict here stands for any dict."""
    if isinstance(here, dict) and isinstance(state, dict):
        for key in dict.fromkeys((*here, *state)) if here else ():
            inner = f"{name}.{key}" if name else key
            yield from _differences(here.get(key), state.get(key), describe=describe, name=inner)
        return
    of_state, of_here = ("missing" if value is None else describe(value) for value in (state, here))
    if of_state != of_here:
        yield f"{name}: {of_state} in the state, {of_here} here"


def _shortened(value: Any) -> str:
    """A value as a message shows it: of a digest the beginning."""
    return f"{value[:16]!r}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value) else repr(value)


def _kind_of(value: Any) -> str:
    """What must be equal of a value that changes as the run goes: shape and dtype, or the type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
