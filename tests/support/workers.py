"""Workers for tests: built, or past warm-up, on a recipe's own data or on documents of random tokens."""

from typing import Any

import numpy as np
import torch

from launcher.data.documents import Documents
from launcher.data.pack.buckets import lay_out
from launcher.data.prepare import PreparedData
from launcher.model.source import load_config
from launcher.runtime.clock import Clock
from launcher.train.setup import Prepared, Worker, prepare_inputs
from tests.conftest import request_for

MAX_LENGTH = 64
ANY = tuple(range(1, MAX_LENGTH + 1))
THREE = (3, 7, 8, 21, 24, 61, 64)  # bucketed into blocks of 8, 24 and 64 positions
TWO = (5, 8, 61, 64)
DOCUMENTS, VALIDATED = 321, 20


def documents(lengths: tuple[int, ...]) -> Documents:
    """321 documents of random tokens, each of one of these lengths; half of the tokens are supervised."""
    offsets = np.concatenate([[0], np.cumsum(np.random.default_rng(0).choice(lengths, DOCUMENTS))])
    ids = np.random.default_rng(1).integers(0, 8192, offsets[-1]).astype(np.int32)
    return Documents(ids, np.random.default_rng(2).random(len(ids)) < 0.5, offsets)


def prepared_from(recipe: Any, texts: Documents, *, device: str) -> Prepared:
    """As `prepare_inputs` gives it: validated on the first 20 documents, trained on the others."""
    every = np.arange(DOCUMENTS)
    train, validation = lay_out(texts, every[VALIDATED:], every[:VALIDATED], data=recipe.data, pad_id=0, seed=0)
    data = PreparedData(
        train=train, validation=validation, counts={}, example=None, train_rows=DOCUMENTS - VALIDATED,
        validation_rows=VALIDATED, loss_on={}, template="none", identity="random",
    )  # fmt: skip
    return Prepared(load_config(recipe.model.name, recipe.model), None, data, torch.device(device))


def built(recipe: Any, texts: Documents | None = None, *, device: str = "cpu") -> Worker:
    """A worker with its model, not compiled. Without documents: on the recipe's data and the device it chooses."""
    request = request_for(recipe)
    prepared = prepare_inputs(request) if texts is None else prepared_from(recipe, texts, device=device)
    worker = Worker(request, prepared, clock=Clock())
    worker.build()
    return worker


def compiled(recipe: Any, texts: Documents | None = None, *, device: str = "cpu") -> Worker:
    """A worker past warm-up and capture, as at the first training step."""
    worker = built(recipe, texts, device=device)
    worker.compile()
    return worker


def perturb(worker: Worker) -> None:
    """Add noise to the adapters: LoRA B begins at zero, where A has neither gradient nor effect."""
    device = worker.accelerator.device
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for parameter in worker.step.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator, device=device) * 0.05)
