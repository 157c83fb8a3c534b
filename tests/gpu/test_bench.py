"""mode=bench on a GPU: the 1B shape in half precision, and a naive side that does not fit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from launcher.proof.bench import side
from launcher.proof.bench.compare import bench
from launcher.records.bench import BenchRecord
from tests.conftest import request_for

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_dynamo")]


@pytest.mark.alone  # the share of the ceiling is that of a card that nobody else uses
@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", "data"), ("float16", "random")])
def test_ours_is_faster_and_smaller_on_the_same_work(recipe_1b: Callable[..., Any], dtype: str, rows: str) -> None:
    *_, record = bench(request_for(recipe_1b(model={"dtype": dtype}, proof={"bench": 10, "bench_rows": rows})))
    assert isinstance(record, BenchRecord) and record.naive is not None
    assert record.holds, record.verdicts
    assert not record.naive.failure
    assert record.speed_up is not None and record.speed_up > 2
    assert record.memory_ratio is not None and record.memory_ratio < 1.2
    for measured in (record.ours, record.naive):
        assert measured.before_mib and 800 < measured.before_mib < 3_000  # NF4 linears and the embedding
        assert measured.peak_allocated_mib and measured.peak_reserved_mib
        assert measured.before_mib < measured.peak_allocated_mib <= measured.peak_reserved_mib
        assert 0 < (measured.ceiling_share or 0) < 1
    assert record.ceiling.size == 8192 and record.ceiling.flops_per_s > 2e13
    print(dtype, rows, record.ours.tokens_per_s, record.naive.tokens_per_s, record.pay_back_steps)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_naive_side_that_does_not_fit_says_so_and_gives_its_peak(
    recipe_1b: Callable[..., Any], checkpointed: bool
) -> None:
    recipe = recipe_1b(proof={"bench": 1, "bench_rows": "random"})
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    limit = torch.cuda.memory_reserved() + 3 * 2**30
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        *_, record = side.naive(request_for(recipe), checkpointed=checkpointed)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not isinstance(record, str) and record.out_of_memory
    assert "out of memory before its first step ended; held by phase: after load" in record.failure
    assert record.peak_allocated_mib and record.before_mib
    assert record.before_mib <= record.peak_allocated_mib <= limit / 2**20
    assert record.steps_s == ()
