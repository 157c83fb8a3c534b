"""What both sides train on: the recipe's data or random blocks of full length, and how much work each step is."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from launcher.data.documents import Documents
from launcher.data.loader import StepBatch, train_loader
from launcher.data.pack.blocks import Blocks
from launcher.proof.bench.flops import model_flops
from launcher.proof.stock import collate, supervised_documents
from launcher.recipe.schema import Recipe
from launcher.records.bench import Workload
from launcher.train.inputs import Prepared, prepare_inputs
from launcher.train.request import Request

WARM_UP_STEPS = 3  # between the first step and the measured ones: allocators fill, graphs are captured


def steps_of(recipe: Recipe) -> int:
    """The first step, the warm-up steps and the measured ones."""
    return 1 + WARM_UP_STEPS + recipe.proof.bench


def bench_inputs(request: Request) -> tuple[Request, Prepared]:
    """The request with train.steps as long as the measurement, which its learning rates then fit, and its data: as
    training prepares it; with proof.bench_rows=random, the same random blocks in every process instead.

    Raises RecipeError (2) and DataError (3).
    """
    recipe = request.recipe
    train = recipe.train.model_copy(update={"steps": steps_of(recipe)})
    request = replace(request, recipe=recipe.model_copy(update={"train": train}))
    prepared = prepare_inputs(request)
    if recipe.proof.bench_rows == "data":
        return request, prepared
    blocks = random_blocks(recipe, vocabulary=prepared.config.vocab_size)
    data = replace(
        prepared.data,
        train=blocks,
        validation=None,
        counts={},
        train_rows=len(blocks),
        validation_rows=0,
        loss_on={"all": len(blocks)},
        notes=(
            f"random rows of {recipe.data.max_length:,} tokens, all of them targets, not the recipe's data",
            "each row is one document: attention may take another path than it does with packed rows",
        ),
    )
    return request, replace(prepared, data=data)


def random_blocks(recipe: Recipe, *, vocabulary: int) -> Blocks:
    """As many blocks as all steps take, each one document of data.max_length random tokens, all supervised."""
    count, width = steps_of(recipe) * recipe.train.accumulation * recipe.train.micro_batch, recipe.data.max_length
    ids = np.random.default_rng(recipe.train.seed).integers(0, vocabulary, count * width).astype(np.int32)
    documents = Documents(ids, np.ones(len(ids), np.bool_), np.arange(count + 1, dtype=np.int64) * width)
    sizes, widths = np.ones(count, np.int64), np.full(count, width, np.int32)
    return Blocks.of(documents, np.arange(count, dtype=np.int64), block_sizes=sizes, widths=widths, pad_id=0)


def step_batches(request: Request, prepared: Prepared) -> list[StepBatch]:
    """The batches of every step, as a worker's own loader yields them."""
    train = request.recipe.train
    loader = train_loader(
        prepared.data.train,
        micro_batch=train.micro_batch,
        accumulation=train.accumulation,
        rank=0,
        world_size=1,
        seed=train.seed,
    )
    return [next(loader) for _ in range(steps_of(request.recipe))]


def hash_batches(batches: Sequence[StepBatch]) -> str:
    """A hash of all ids, labels and document boundaries."""
    digest = hashlib.sha256()
    for batch in batches:
        for micro in batch.micro_batches:
            for tensor in (micro.input_ids, micro.labels, micro.document_ids):
                digest.update(repr(tuple(tensor.shape)).encode())
                digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def workload(request: Request) -> Iterator[Workload]:
    """Prepare the data, which leaves it in the cache for both sides; yields the work of each step."""
    request, prepared = bench_inputs(request)
    batches = step_batches(request, prepared)
    flops = model_flops(prepared.config, request.recipe.lora)
    lengths = [[len(ids) for micro in b.micro_batches for ids, _ in supervised_documents(micro)] for b in batches]
    yield Workload(
        tokens=tuple(batch.tokens for batch in batches),
        supervised_tokens=tuple(batch.supervised_tokens for batch in batches),
        naive_passes=tuple(len(collate(batch).groups) for batch in batches),
        flops=tuple(flops.of(n, targets=batch.supervised_tokens) for n, batch in zip(lengths, batches, strict=True)),
        batches=hash_batches(batches),
    )
