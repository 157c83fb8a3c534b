"""Deep models in bf16, whose gradients no two paths bring within 0.1 of each other: fp32 decides."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.model import lora
from launcher.proof import start
from launcher.proof.parity import parity
from launcher.proof.start import start_verdict
from tests.conftest import request_for
from tests.support.any_models import build_any
from tests.support.models import ARCHITECTURES

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_dynamo")]
NARROW = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 12, "num_key_value_heads": 4}
IDS = {"vocab_size": 32768, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
PIECES = [torch.randint(8192, (n,), generator=torch.Generator().manual_seed(n)) for n in (256, 240, 9)]


def test_a_deep_model_is_within_the_gate_of_parity(recipe_1b: Callable[..., Any], tmp_path: Path) -> None:
    """Phi-4-mini's 32 layers, at half its width."""
    config = json.loads((ARCHITECTURES / "Phi-4-mini-instruct" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **NARROW, **IDS}), encoding="utf-8")
    recipe = recipe_1b(
        model={"name": str(tmp_path), "dtype": "bfloat16"},
        lora={"targets": ["all-linear"]},
        data={"max_length": 2048},
        proof={"parity": 4},
    )
    *_, record = parity(request_for(recipe))
    print(*(f"{v.claim}: {v.evidence}" for v in record.verdicts), sep="\n")
    print(min(a.least_cosine for a in record.adapters), record.gradient_error)
    assert record.holds, record.verdicts


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_start_is_judged_by_float32_beyond_a_limit(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    size = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64}
    model = build_any("helium", dtype=dtype, length=512, device="cuda", num_hidden_layers=24, **size, **IDS)
    assert start_verdict(model, PIECES, seed=0).holds
    monkeypatch.setattr(start, "GRADIENT_ERROR_HALF", 0.0)  # every model is beyond it
    right = start_verdict(model, PIECES, seed=0)
    print(dtype, right.evidence)
    assert right.holds and "judged by stock code in float32" in right.evidence, right.evidence
    kernel = lora.qlora_linear
    monkeypatch.setattr(lora, "qlora_linear", lambda *args, scaling, **rest: kernel(*args, scaling=2 * scaling, **rest))
    wrong = start_verdict(model, PIECES, seed=0)
    assert not wrong.holds and "first difference: model.layers.0" in wrong.evidence, wrong.evidence
