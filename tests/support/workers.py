"""Workers on a recipe's own data or on documents of given lengths."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from launcher.data.documents import Documents
from launcher.data.pack.buckets import lay_out
from launcher.data.prepare import PreparedData
from launcher.model.source import load_config
from launcher.train.request import Request
from launcher.train.setup import Clock, Prepared, Worker, prepare
from tests.conftest import request_for

ANY = tuple(range(1, 65))  # document lengths
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
    prepared = prepare(request) if data is None else _prepared(request, data, torch.device(device))
    worker = Worker(request, prepared, clock=Clock())
    worker.build()
    return worker


def compiled(recipe: Any, data: Documents | None = None, *, device: str = "cpu") -> Worker:
    """As `built`, past warm-up."""
    worker = built(recipe, data, device=device)
    worker.compile()
    return worker


def perturb(parameters: Iterable[nn.Parameter]) -> None:
    """Move every adapter matrix by seeded noise: LoRA's B starts at zero, and then no gradient reaches A."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) * 0.05)


def _prepared(request: Request, data: Documents, device: torch.device) -> Prepared:
    numbers = np.arange(len(data.lengths))
    train, validation = lay_out(
        data, numbers[VALIDATION:], numbers[:VALIDATION], data=request.recipe.data, pad_id=0, seed=0
    )
    prepared = PreparedData(
        train=train, validation=validation, counts={}, example=None, train_rows=len(numbers) - VALIDATION,
        validation_rows=VALIDATION, loss_on={}, template="none", identity="random",
    )  # fmt: skip
    return Prepared(load_config(request.source, request.recipe.model), None, prepared, device)
