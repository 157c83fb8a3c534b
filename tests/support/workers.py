"""Workers on a recipe's own data or on documents of given lengths."""

from typing import Any

import numpy as np
import torch

from launcher.data.documents import Documents
from launcher.data.pack.buckets import lay_out
from launcher.data.prepare import PreparedData
from launcher.model.load import load_config
from launcher.runtime.clock import Clock
from launcher.train.inputs import Prepared, prepare_inputs
from launcher.train.request import Request
from launcher.train.setup import Worker
from tests.conftest import request_for
from tests.support.tensors import add_noise

MAX_LENGTH = 64
ANY = tuple(range(1, MAX_LENGTH + 1))  # document lengths
THREE = (3, 7, 8, 21, 24, 61, 64)  # bucketed into widths of 8, 24 and 64
TWO = (5, 8, 61, 64)  # bucketed into widths of 8 and 64
VALIDATION = 20  # documents


def documents(lengths: tuple[int, ...], *, count: int = 321) -> Documents:
    """Random tokens in `count` documents of lengths drawn from `lengths`; about half of the tokens are supervised."""
    offsets = np.concatenate([[0], np.cumsum(np.random.default_rng(0).choice(lengths, count))])
    ids = np.random.default_rng(1).integers(0, 8192, offsets[-1]).astype(np.int32)
    return Documents(ids, np.random.default_rng(2).random(len(ids)) < 0.5, offsets)


def built(recipe: Any, data: Documents | None = None, *, device: str = "cpu") -> Worker:
    """A worker with its model, not yet compiled. `data`: validated on the first 20 documents, trained on the others,
    on `device`; without it the recipe's data, on the device that training would choose."""
    request = request_for(recipe)
    prepared = prepare_inputs(request) if data is None else _prepared(request, data, torch.device(device))
    worker = Worker(request, prepared, clock=Clock())
    worker.build()
    return worker


def compiled(recipe: Any, data: Documents | None = None, *, device: str = "cpu") -> Worker:
    """As `built`, past warm-up."""
    worker = built(recipe, data, device=device)
    worker.compile()
    return worker


def perturb(worker: Worker) -> None:
    """Move the adapters by seeded noise: LoRA's B starts at zero, and then no gradient reaches A."""
    add_noise(worker.step.parameters)


def _prepared(request: Request, data: Documents, device: torch.device) -> Prepared:
    numbers = np.arange(len(data.lengths))
    train, validation = lay_out(
        data, numbers[VALIDATION:], numbers[:VALIDATION], data=request.recipe.data, pad_id=0, seed=0
    )
    prepared = PreparedData(
        train=train, validation=validation, counts={}, examples=(), train_rows=len(numbers) - VALIDATION,
        validation_rows=VALIDATION, loss_on={}, template="none", identity="random", content="random",
    )  # fmt: skip
    return Prepared(load_config(request.source, request.recipe.model), None, prepared, device)
