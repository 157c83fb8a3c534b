"""What both sides train on: the recipe's data, or random rows of full length, and what a step of it amounts to."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from launcher.data.documents import Documents
from launcher.data.loader import StepBatch, train_loader
from launcher.data.pack.blocks import Blocks
from launcher.proof.bench.flops import model_flops
from launcher.proof.stock import supervised_documents
from launcher.recipe.schema import Recipe
from launcher.records.bench import Workload
from launcher.train.request import Request
from launcher.train.setup import Prepared, prepare_inputs

WARM_UP_STEPS = 3  # after the first step and before the measured ones: allocators fill, graphs are captured


def steps_of(recipe: Recipe) -> int:
    """The first, the warm-up and the measured ones."""
    return 1 + WARM_UP_STEPS + recipe.proof.bench


def bench_request(request: Request) -> Request:
    """The request with train.steps as long as the measurement: the learning rate's schedule is that of such a run."""
    recipe = request.recipe
    train = recipe.train.model_copy(update={"steps": steps_of(recipe)})
    return replace(request, recipe=recipe.model_copy(update={"train": train}))


def bench_data(request: Request) -> Prepared:
    """As training prepares it; with proof.bench_rows=random, rows of random tokens take the data's place, in every
    process the same.

    Raises RecipeError (2) and DataError (3).
    """
    prepared = prepare_inputs(request)
    if request.recipe.proof.bench_rows == "data":
        return prepared
    rows = random_rows(request.recipe, vocabulary=prepared.config.vocab_size)
    data = replace(
        prepared.data,
        train=rows,
        validation=None,
        counts={},
        train_rows=len(rows),
        validation_rows=0,
        loss_on={"all": len(rows)},
        notes=(
            f"random rows of {request.recipe.data.max_length:,} tokens, all of them targets, not the recipe's data",
            "each row is one document: attention may take another path than it does with packed rows",
        ),
    )
    return replace(prepared, data=data)


def random_rows(recipe: Recipe, *, vocabulary: int) -> Blocks:
    """A row of data.max_length random tokens, one document, for each row of each step; all tokens are targets, but the
    first, which nothing predicts."""
    rows, width = steps_of(recipe) * recipe.train.accumulation * recipe.train.micro_batch, recipe.data.max_length
    ids = np.random.default_rng(recipe.train.seed).integers(0, vocabulary, rows * width).astype(np.int32)
    documents = Documents(ids, np.ones(len(ids), np.bool_), np.arange(rows + 1, dtype=np.int64) * width)
    sizes, widths = np.ones(rows, np.int64), np.full(rows, width, np.int32)
    return Blocks.of(documents, np.arange(rows, dtype=np.int64), block_sizes=sizes, widths=widths, pad_id=0)


def step_batches(request: Request, prepared: Prepared) -> list[StepBatch]:
    """The batches of every step, the same as a worker's own loader gives."""
    train = request.recipe.train
    loader: Iterator[StepBatch] = train_loader(
        prepared.data.train,
        micro_batch=train.micro_batch,
        accumulation=train.accumulation,
        rank=0,
        world_size=1,
        seed=train.seed,
    )
    return [next(loader) for _ in range(steps_of(request.recipe))]


def digest(batches: Sequence[StepBatch]) -> str:
    """Of everything that a step is made from."""
    found = hashlib.sha256()
    for batch in batches:
        for micro in batch.micro_batches:
            for tensor in (micro.input_ids, micro.labels, micro.document_ids):
                found.update(repr(tuple(tensor.shape)).encode())
                found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]


def workload(request: Request) -> Workload:
    """Prepare the data, which leaves it in the cache for the sides, and say what there is to do in each step."""
    prepared = bench_data(request)
    batches = step_batches(request, prepared)
    flops = model_flops(prepared.config, request.recipe.lora)
    return Workload(
        tokens=tuple(batch.tokens for batch in batches),
        supervised_tokens=tuple(batch.supervised_tokens for batch in batches),
        flops=tuple(flops.of(document_lengths(batch), targets=batch.supervised_tokens) for batch in batches),
        batches=digest(batches),
    )


def document_lengths(batch: StepBatch) -> list[int]:
    """Of the documents that have a target."""
    return [
        len(ids)
        for micro in batch.micro_batches
        for ids, _ in supervised_documents(micro.input_ids, micro.labels, micro.document_ids)
    ]
