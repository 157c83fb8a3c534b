"""lora.init=loftq: the start is nearer to the 16-bit model than NF4 is, by PEFT's own decomposition."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from launcher.errors import ContractError, RecipeError
from launcher.model import loftq
from launcher.model.lora import ADAPTER
from launcher.proof.stock import stock_code
from launcher.train.setup import Worker
from tests.support.models import build
from tests.support.workers import built

Start = Callable[..., Worker]


@pytest.fixture
def start(make: Callable[..., Any]) -> Start:
    """A worker at its start, by these keys of the section lora."""
    return lambda **lora: built(make(lora={"init": "loftq", "r": 8, **lora}))


def errors(worker: Worker, folder: Path) -> dict[str, tuple[Tensor, Any]]:
    """By the name of each adapted weight: what bitsandbytes' own dequantisation is off by, and the linear."""
    from bitsandbytes.functional import dequantize_4bit

    files, found = load_file(folder / "model.safetensors"), {}
    for name, module in worker.built.peft.named_modules():
        if hasattr(module, "lora_A"):
            key = name.removeprefix("base_model.model.") + ".weight"
            weight = module.base_layer.weight
            found[key] = files[key].float() - dequantize_4bit(weight.data, weight.quant_state).float(), module
    return found


def update(module: Any) -> Tensor:
    b, a = module.lora_B[ADAPTER].weight.detach(), module.lora_A[ADAPTER].weight.detach()
    return module.scaling[ADAPTER] * b @ a


def test_each_weight_is_nearer_by_the_product_that_peft_computes(start: Start, small_model: Path) -> None:
    worker = start(rank_pattern={"down_proj": 5})
    found = errors(worker, small_model)
    assert len(found) == 14 and {module.scaling[ADAPTER] for _, module in found.values()} == {4.0, 6.4}
    for name, (error, module) in found.items():
        peft = _low_rank_decomposition(error, reduced_rank=module.r[ADAPTER])
        product = peft["L"] @ peft["R"]
        torch.testing.assert_close(update(module), product, rtol=1e-3, atol=1e-4 * float(product.abs().max()))
        a, scaling = module.lora_A[ADAPTER].weight.detach(), module.scaling[ADAPTER]
        torch.testing.assert_close(a.norm(dim=1) * scaling**0.5, peft["R"].norm(dim=1), rtol=1e-3, atol=0)
        assert (error - update(module)).norm() < 0.95 * error.norm(), name
    [verdict] = worker.start_verdicts
    assert verdict.holds and verdict.evidence.startswith("14 of 14 weights"), verdict
    assert any("lora.init=loftq: computed from what NF4 has rounded away, in " in note for note in worker.built.notes)


def logits_errors(worker: Worker, folder: Path) -> tuple[float, float]:
    """How far the logits of the NF4 base and of the start are from those of the 16-bit model."""
    ids = torch.randint(8192, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), stock_code(worker.built.peft) as stock:
        exact = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
        begun = stock(input_ids=ids).logits
        with stock.disable_adapter():
            base = stock(input_ids=ids).logits
    return float((base - exact).norm()), float((begun - exact).norm())


@pytest.mark.parametrize("dora", [False, True])
def test_the_logits_of_the_start_are_nearer_to_those_of_the_16_bit_model(
    start: Start, small_model: Path, dora: bool
) -> None:
    base, begun = logits_errors(start(r=32, dora=dora), small_model)
    assert begun < 0.8 * base
    worker = start(r=32, dora=dora)
    with torch.no_grad():
        for _, module in errors(worker, small_model).values():
            module.lora_B[ADAPTER].weight.neg_()
    assert logits_errors(worker, small_model)[1] > 1.2 * base  # the other way it is further


def test_a_start_that_forgets_the_scale_of_the_update_ends_the_run(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = loftq.leading_svd

    def scaled(*arguments: Any, **options: Any) -> Any:
        u, s, v = right(*arguments, **options)
        return u, s * 4, v

    monkeypatch.setattr(loftq, "leading_svd", scaled)
    with pytest.raises(ContractError, match=r"nearer to the weights of the files than NF4 is; 0 of 14 weights"):
        start()


def test_with_magnitudes_of_nf4_the_start_would_be_another(start: Start, small_model: Path) -> None:
    worker, plain = start(dora=True), start(dora=True, init="default")
    products = errors(worker, small_model)
    for name, (_, other) in errors(plain, small_model).items():
        linear, x = products[name][1], torch.randn(3, 5, other.in_features)
        expected = linear.base_layer(x) + x @ update(linear).T
        torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4)
        linear.lora_magnitude_vector[ADAPTER].weight.data.copy_(other.lora_magnitude_vector[ADAPTER].weight)
        assert (linear(x) - expected).abs().max() > 1e-3 * expected.abs().max(), name


def quantised(folder: Path, small_model: Path) -> str:
    """The small model as a checkpoint in NF4."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(small_model, quantization_config=settings).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"quant": {"type": "none"}}, "quant.type=none rounds nothing.\nSet quant.type=nf4, or"),
        ({"model": {"init": "random"}}, "model.init=random has no files.\nName a checkpoint in model.name"),
        (
            {"model": {"name": "quantised"}},
            "this checkpoint holds them rounded already.\nName the unquantised checkpoint",
        ),
    ],
)
def test_where_nothing_is_rounded_it_is_refused(
    make_recipe: Any, small_model: Path, tmp_path: Path, sections: Any, reason: str
) -> None:
    if "name" in sections.get("model", {}):
        sections = {"model": {"name": quantised(tmp_path / "nf4", small_model)}}
    with pytest.raises(RecipeError, match=f"{reason}.*use another start, such as lora.init=default"):
        build(make_recipe(lora={"init": "loftq"}, **sections))


def test_a_rank_beyond_what_is_rounded_is_refused(start: Start) -> None:
    with pytest.raises(RecipeError, match=r"q_proj.weight is changed in 64, its rank is 65.\nLower lora.r"):
        start(r=65)
