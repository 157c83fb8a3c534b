"""Deep models in half precision, where two right forwards are farther apart than the limits: float32 decides."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.model import lora
from launcher.model.build import BuiltModel
from launcher.proof import start
from launcher.proof.float32_stock import float32_arithmetic
from launcher.proof.start import start_verdict
from launcher.proof.stock import stock_code, stock_logits, stock_model, summed_loss
from launcher.recipe.schema import Recipe
from tests.conftest import small_config
from tests.support.any_models import build_any
from tests.support.tensors import relative_error

PIECES = [torch.randint(8192, (n,), generator=torch.Generator().manual_seed(n)) for n in (120, 60)]
DEEP = {
    "length": 180,
    "num_hidden_layers": 16,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = [0, *PIECES[1][:2].unique().tolist()]  # 0 pads
JUDGED = "beyond a limit, so judged by stock code in float32: "


def drawn(model: BuiltModel) -> BuiltModel:
    """With biases and norms that matter."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.peft.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty(parameter.shape).normal_(std=0.3, generator=generator))
    return model


@pytest.fixture(scope="module")
def deep() -> BuiltModel:
    return drawn(build_any("helium", dtype="bfloat16", attention_bias=True, mlp_bias=True, **DEEP))


def test_a_deep_model_beyond_the_limits_passes_where_it_is_as_near_to_float32_as_stock_code(deep: BuiltModel) -> None:
    verdict = start_verdict(deep, PIECES, seed=0)
    assert verdict.holds and JUDGED in verdict.evidence, verdict.evidence
    assert re.search(r"\d+ of 224 matrices are below it and about as near to fp32 as stock's", verdict.evidence)


def test_a_model_within_the_limits_is_not_computed_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "float32_arithmetic", None)
    assert start_verdict(build_any("helium", dtype="bfloat16", length=180), PIECES, seed=0).holds


def norm_without_weight(model: BuiltModel, patch: pytest.MonkeyPatch) -> None:
    norm: Any = model.packed.body.norm
    wrong = {"__module__": "launcher.x", "forward": lambda self, x: nn.functional.rms_norm(x, x.shape[-1:])}
    patch.setattr(norm, "__class__", type("Other", (type(norm),), wrong))


def larger_embedding(model: BuiltModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.packed, "embedding_multiplier", 1.25)


def larger_scaling(model: BuiltModel, patch: pytest.MonkeyPatch) -> None:
    right = lora.qlora_linear
    patch.setattr(lora, "qlora_linear", lambda *args, scaling, **others: right(*args, scaling=1.5 * scaling, **others))


def no_biases(model: BuiltModel, patch: pytest.MonkeyPatch) -> None:
    right = lora.QLoraLinear4bit.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        y = right(self, x)
        return y if self.base_layer.bias is None else y - self.base_layer.bias

    patch.setattr(lora.QLoraLinear4bit, "forward", forward)


@pytest.mark.parametrize(
    ("fault", "first"),
    [
        (norm_without_weight, "model.norm"),
        (larger_embedding, "the input of model.layers.0"),
        (larger_scaling, "model.layers."),
        (no_biases, "model.layers.0.self_attn"),
    ],
)
def test_a_fault_is_found_and_named_under_the_noise(
    deep: BuiltModel, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None], first: str
) -> None:
    fault(deep, monkeypatch)
    verdict = start_verdict(deep, PIECES, seed=0)
    assert not verdict.holds and JUDGED in verdict.evidence
    assert f"first difference: {first}" in verdict.evidence, verdict.evidence


def test_forgotten_windows_are_found_under_the_noise() -> None:
    model = build_any("mistral", dtype="bfloat16", sliding_window=32, **DEEP)
    right = start_verdict(model, PIECES, seed=0)
    assert right.holds and JUDGED in right.evidence, right.evidence
    model.packed.kinds = tuple(kind._replace(window=None) for kind in model.packed.kinds)
    wrong = start_verdict(model, PIECES, seed=0)
    assert not wrong.holds and "first difference: model.layers.0" in wrong.evidence, wrong.evidence


def test_a_model_that_does_not_compute_in_float32_is_judged_by_the_limits(
    deep: BuiltModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention: Any = type(deep.packed.body.layers[0].self_attn)
    right = attention.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.dtype == torch.float32:
            raise RuntimeError("expected BFloat16")
        return right(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    verdict = start_verdict(deep, PIECES, seed=0)
    assert not verdict.holds
    assert "; beyond a limit, and stock code does not compute in float32 here (expected BFloat16)" in verdict.evidence


@pytest.mark.parametrize(
    ("model_type", "quant", "sections", "changes"),
    [
        ("llama", "nf4", {}, {"attention_bias": True, "mlp_bias": True}),
        ("llama", "none", {}, {}),
        ("olmo", "nf4", {"dora": True}, {}),
        ("gemma3_text", "nf4", {"trainable_tokens": TOKENS}, {"tie_word_embeddings": True}),
        ("llama", "nf4", {"trainable_tokens": TOKENS}, {"tie_word_embeddings": False}),
    ],
)
def test_stock_code_in_float32_is_the_fp32_reference_of_parity_and_leaves_every_bit(
    model_type: str, quant: str, sections: dict[str, Any], changes: dict[str, Any]
) -> None:
    changes = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes}
    built = build_any(model_type, dtype="bfloat16", quant=quant, lora=sections, **changes)
    model = {"init": "random", "dtype": "bfloat16", "family": "auto"}
    recipe = Recipe.model_validate(
        {"model": model, "quant": {"type": quant}, "lora": {"r": 4, **sections}, "train": {"steps": 1}}
    )
    config = small_config(model_type, **changes)
    how: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "reference": True}
    reference: Any = stock_model(recipe, "", config, **how, token_ids=list(map(int, recipe.lora.trainable_tokens)))
    tensors = {**dict(built.peft.named_parameters()), **dict(built.peft.named_buffers())}
    before = {name: (tensor.detach().clone(), tensor.data_ptr()) for name, tensor in tensors.items()}
    reference.load_state_dict({n: p for n, p in built.peft.named_parameters() if ".lora_" in n}, strict=False)
    ids, labels = PIECES[1][None], PIECES[1][None].roll(-1, 1)
    with stock_code(built.peft) as stock, float32_arithmetic(stock):
        ours = gradients(stock, ids, labels)
        assert stock_logits(stock, ids, dtype=torch.float32).dtype == torch.float32
    theirs = gradients(reference, ids, labels)
    assert max(relative_error(one, theirs[name]) for name, one in ours.items()) < 1e-3
    for name, tensor in tensors.items():
        assert tensor.dtype == before[name][0].dtype and tensor.data_ptr() == before[name][1]
        assert torch.equal(tensor, before[name][0])
    assert not any("forward" in vars(module) for module in built.peft.modules())


def test_a_layer_that_casts_to_half_precision_is_no_reference(
    deep: BuiltModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer: Any = type(deep.packed.body.layers[0])
    right = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, *args, **kwargs: right(self, *args, **kwargs).bfloat16())
    verdict = start_verdict(deep, PIECES, seed=0)
    assert "stock code does not compute in float32 here (HeliumDecoderLayer gives bfloat16)" in verdict.evidence


def gradients(model: Any, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of B and of trained tokens: at zero, where B begins, that of A is zero."""
    kinds = ".lora_B.", ".trainable_tokens_delta."
    named = {name: p for name, p in model.named_parameters() if any(kind in name for kind in kinds)}
    loss = summed_loss(model, ids, labels, dtype=torch.float32)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
