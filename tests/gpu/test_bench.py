"""mode=bench on a GPU: the 1B shape in half precision, and a naive side that does not fit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from launcher.proof.bench import side
from launcher.proof.bench.compare import bench
from launcher.recipe.locate import locate
from launcher.records.bench import BenchRecord
from launcher.runtime.ranks import RankInfo
from launcher.train.request import Request
from tests.conftest import ROOT, request_for

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_dynamo")]
SHAPE = "unsloth/Llama-3.2-1B-Instruct"


def random_1b(make_recipe: Callable[..., Any], **sections: dict[str, Any]) -> Any:
    base: dict[str, dict[str, Any]] = {
        "model": {"name": SHAPE, "init": "random", "dtype": "bfloat16"},
        "lora": {"r": 16},
        "data": {"max_length": 1024, "validation": 0},
        "compile": {"backend": "inductor"},
        "train": {"steps": 1, "micro_batch": 2},
        "proof": {"bench": 10},
    }
    return make_recipe(**{name: base.get(name, {}) | sections.get(name, {}) for name in {*base, *sections}})


@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", "random"), ("float16", "random"), ("bfloat16", "data")])
def test_ours_is_faster_and_smaller_on_the_same_work(make_recipe: Callable[..., Any], dtype: str, rows: str) -> None:
    recipe = random_1b(
        make_recipe,
        model={"dtype": dtype},
        proof={"bench_rows": rows},
        data={"sources": [{"path": str(ROOT / "recipes" / "tiny" / "train.jsonl")}]},
    )
    shipped = ROOT / "recipes"
    request = Request(recipe, "test", locate(recipe.model, shipped / "architectures"), shipped, RankInfo(0, 0, 1, 1))
    *_, found = bench(request)
    assert isinstance(found, BenchRecord) and found.naive is not None
    assert found.holds, found.verdicts
    assert not found.naive.failure
    assert found.speed_up is not None and found.speed_up > 2
    assert found.memory_ratio is not None and found.memory_ratio < 1.2
    for measured in (found.ours, found.naive):
        assert measured.before_mib and 800 < measured.before_mib < 3_000  # NF4 linears and the embedding
        assert measured.peak_allocated_mib and measured.peak_reserved_mib
        assert measured.before_mib < measured.peak_allocated_mib <= measured.peak_reserved_mib
        assert 0 < (measured.ceiling_share or 0) < 1
    assert found.ceiling.size == 8192 and found.ceiling.flops_per_s > 2e13
    print(dtype, rows, found.ours.tokens_per_s, found.naive.tokens_per_s, found.pay_back_steps)


def test_a_naive_side_that_does_not_fit_says_so_and_gives_its_peak(make_recipe: Callable[..., Any]) -> None:
    recipe = random_1b(make_recipe, proof={"bench": 1, "bench_rows": "random"})
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 3 * 2**30) / total)
    try:
        *_, found = side.naive(request_for(recipe))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not isinstance(found, str) and found.out_of_memory
    assert "out of memory before its first step ended; held by phase: after load" in found.failure
    assert found.peak_allocated_mib and found.before_mib and found.before_mib <= found.peak_allocated_mib < 4_000
    assert found.steps_s == ()
