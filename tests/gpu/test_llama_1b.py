"""The shape of Llama 3.2 1B, random weights, on the shipped chats: its rate, its peak, and what it computes."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.data.documents import Documents
from launcher.memory.ledger import MIB
from launcher.proof.parity import parity, release
from launcher.train.setup import Worker
from tests.conftest import request_for
from tests.support.models import ARCHITECTURES
from tests.support.workers import built, documents

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_dynamo")]


@contextmanager
def compiled(recipe: Any, data: Documents | None = None) -> Iterator[Worker]:
    """A worker past warm-up, which is gone afterwards; peaks are counted from its compilation on."""
    worker = built(recipe, data, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    worker.compile()
    yield worker
    worker.plan.check()
    release(worker)


def tokens_per_s(worker: Worker) -> float:
    """The median over 20 steps, after three."""
    rates = []
    for _ in range(23):
        torch.cuda.synchronize()
        start = time.perf_counter()
        batch = next(worker.batches)
        worker.step(batch)
        torch.cuda.synchronize()
        rates.append(batch.tokens / (time.perf_counter() - start))
        assert batch.micro_batches[0].input_ids.shape == (2, 2048)
    return statistics.median(rates[3:])


@pytest.mark.alone
def test_packed_text_trains_at_nine_tenths_of_the_rate_of_full_random_rows(recipe_1b: Callable[..., Any]) -> None:
    """Each in a worker built for its own data, with the same attention; half of the random tokens are supervised, as in
    the chats."""
    recipe = recipe_1b(model={"attention": "varlen"}, data={"max_length": 2048}, train={"steps": 50, "micro_batch": 2})
    with compiled(recipe) as worker:
        text, packed = worker.prepared.data.train, tokens_per_s(worker)
    with compiled(recipe, documents((2048,), count=84)) as worker:
        full, random = worker.prepared.data.train, tokens_per_s(worker)
    print(f"packed text {packed:,.0f} tok/s, full random rows {random:,.0f} tok/s, fill {text.fill:.4f}")
    assert packed >= 0.9 * random
    assert text.max_documents > 20 and text.max_seqlen < 2048
    assert (full.max_documents, full.max_seqlen, full.fill) == (1, 2048, 1.0)


@pytest.mark.parametrize(("dtype", "length", "micro_batch"), [("bfloat16", 2048, 2), ("float16", 1024, 1)])
def test_packed_chats_peak_at_the_forecast_compiling_included(
    recipe_1b: Callable[..., Any], dtype: str, length: int, micro_batch: int
) -> None:
    recipe = recipe_1b(
        model={"dtype": dtype},
        data={"max_length": length},
        memory={"activations": "selective"},
        train={"steps": 10, "micro_batch": micro_batch},
    )
    with compiled(recipe) as worker:
        for _ in range(3):
            worker.step(next(worker.batches))
        torch.cuda.synchronize()
        peak, forecast = torch.cuda.max_memory_allocated() / MIB, worker.policy.forecast_mib
        print(f"{dtype} {micro_batch} x {length}: peak {peak:,.0f} MiB, forecast {forecast:,.0f}")
        assert forecast is not None and 0.85 * forecast < peak < 1.03 * forecast
        packed = worker.built.packed
        assert packed.loss_rows(micro_batch * length) < 0.9 * micro_batch * length
        assert packed.loss_chunk % 8 == 0


@pytest.mark.parametrize(
    ("dtype", "scope", "layers"),
    [
        ("bfloat16", "layer", 16),
        ("float16", "layer", 16),
        ("float16", "regions", 4),  # fewer layers: each costs compile time where it has graphs of its own
        ("bfloat16", "model", 4),
    ],
)
def test_a_captured_step_computes_what_stock_code_computes(
    recipe_1b: Callable[..., Any], tmp_path: Path, dtype: str, scope: str, layers: int
) -> None:
    config = json.loads((ARCHITECTURES / "Llama-3.2-1B-Instruct" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}), encoding="utf-8")
    recipe = recipe_1b(
        model={"name": str(tmp_path), "dtype": dtype},
        compile={"scope": scope},
        train={"micro_batch": 2},
        proof={"parity": 16},
    )
    *_, record = parity(request_for(recipe))
    print(dtype, scope, record.loss_error, record.gradient_error, min(a.least_cosine for a in record.adapters))
    print(*record.lengths, sep="\n")
    assert record.start.cuda_graphs == "on"
    assert record.holds, record.verdicts
    assert record.verdicts[-1].claim == "every step ran compiled" and len(record.adapters) == 14
