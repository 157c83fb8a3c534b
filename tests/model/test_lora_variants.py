"""Every variant of the adapters has the loss and the gradients of stock PEFT, given the same settings by hand."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError

from launcher.errors import RecipeError
from launcher.model.family_choice import family_of
from launcher.model.grouped import group_projections
from launcher.model.load import empty_model, random_base
from launcher.model.lora import attach_lora, orthogonal_start, stock_lora
from launcher.model.lora_targets import adapted_linears, check_targets
from launcher.recipe.lora_section import LoraSection
from launcher.recipe.schema import QuantSection
from tests.conftest import small_config
from tests.support.models import packed_batch, packed_form

CPU = torch.device("cpu")
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REGEX = r"re:model\.layers\.\d+\.self_attn\.[qv]_proj"
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # keys of ours, PEFT's settings
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "all-linear": ({"targets": ["all-linear"]}, {"target_modules": "all-linear"}),
    "expression": ({"targets": [REGEX]}, {"target_modules": REGEX.removeprefix("re:")}),
    "layers": ({"layers": ["1-2"]}, {"layers_to_transform": [1, 2]}),
    "patterns": (
        {"rank_pattern": {"down_proj": 2, r"layers\.0\.self_attn\.q_proj": 6}, "alpha_pattern": {"[qkv]_proj": 5.0}},
        {"rank_pattern": {"down_proj": 2, r"layers\.0\.self_attn\.q_proj": 6}, "alpha_pattern": {"[qkv]_proj": 5.0}},
    ),
    "patterns and rslora": (
        {"rank_pattern": {"down_proj": 2}, "rslora": True},
        {"rank_pattern": {"down_proj": 2}, "use_rslora": True},
    ),
    "gaussian": ({"init": "gaussian"}, {"init_lora_weights": "gaussian"}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "dora and rslora in some layers": (
        {"dora": True, "rslora": True, "layers": ["0", "2"]},
        {"use_dora": True, "use_rslora": True, "layers_to_transform": [0, 2]},
    ),
}


def base_model(quant: str = "nf4") -> Any:
    config = small_config(num_hidden_layers=3)
    return random_base(config, quant=QuantSection(type=quant), dtype=torch.float32, device=CPU, seed=0)


def perturbed(peft: Any) -> Any:
    """The model with every trained value moved, by an amount that its name alone decides."""
    with torch.no_grad():
        for number, (_, parameter) in enumerate(trained(peft)):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.05)
    return peft


def trained(peft: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in peft.named_parameters() if parameter.requires_grad]


def gradients(peft: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in trained(peft)}


def ours(lora: dict[str, Any], *, quant: str = "nf4") -> tuple[Any, torch.Tensor]:
    """Our model with grouped projections, after a backward pass, and its loss."""
    base = base_model(quant)
    peft = perturbed(attach_lora(base, LoraSection(r=4, **lora), seed=0))
    group_projections(base.model.layers, mlp=family_of(base.config, max_length=20).mlp)
    loss = packed_form(base)(*packed_batch(base.config.vocab_size))
    loss.backward()
    return peft, loss.detach()


def stock(settings: dict[str, Any], *, quant: str = "nf4") -> tuple[Any, torch.Tensor]:
    """PEFT's model, document by document."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 32, "target_modules": SEVEN, "task_type": "CAUSAL_LM", **settings})
    torch.manual_seed(0)
    peft = perturbed(get_peft_model(base_model(quant), config))
    ids, labels, _, documents, _ = packed_batch(peft.config.vocab_size)
    total = torch.zeros(())
    for row, its_labels, numbers in zip(ids, labels, documents, strict=True):
        for number in numbers.unique():
            where = numbers == number
            logits = peft(input_ids=row[where][None]).logits[0]
            total = total + F.cross_entropy(logits, its_labels[where], ignore_index=-100, reduction="sum").nan_to_num()
    total.backward()
    return peft, total.detach()


@pytest.mark.parametrize("quant", ["nf4", "none"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_has_the_loss_and_the_gradients_of_stock_peft(variant: str, quant: str) -> None:
    lora, settings = VARIANTS[variant]
    (peft, loss), (stock_peft, stock_loss) = ours(lora, quant=quant), stock(settings, quant=quant)
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=0)
    expected = gradients(stock_peft)
    assert gradients(peft).keys() == expected.keys()
    for name, gradient in gradients(peft).items():  # fp32 sums in another order
        assert expected[name].norm() > 0 and (gradient - expected[name]).norm() < 1e-4 * expected[name].norm(), name


def test_a_scale_of_another_variant_is_seen_by_that_comparison() -> None:
    _, loss = ours({})
    _, other = stock({"use_rslora": True})
    assert abs(loss - other) > 1e-3 * abs(loss)


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_dora_with_dropout_drops_what_stock_peft_drops(quant: str) -> None:
    ours_of, stock_of = (
        perturbed(make(base_model(quant), LoraSection(r=4, dora=True, dropout=0.4), seed=0))
        for make in (attach_lora, stock_lora)
    )
    x = torch.randn(2, 5, 64)
    results = []
    for peft in (ours_of, stock_of.train()):
        layer = peft.base_model.model.model.layers[0].mlp.up_proj
        torch.manual_seed(3)
        y = layer(x)
        y.square().sum().backward()
        results.append((y.detach(), [p.grad for p in layer.parameters() if p.requires_grad]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert len(results[0][1]) == 3
    with torch.no_grad():  # evaluation has no dropout
        assert torch.equal(*(ours_of.base_model.model.model.layers[0].mlp.up_proj(x) for _ in range(2)))


def test_dora_whose_norm_is_a_twentieth_wrong_is_seen_by_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *a, **k: plain(*a, **k) * 1.05)  # PEFT uses norm
    (_, loss), (_, stock_loss) = ours({"dora": True}), stock({"use_dora": True})
    assert abs(loss - stock_loss) > 1e-4 * stock_loss


def test_the_orthogonal_start_is_that_of_peft_and_changes_nothing_under_nf4() -> None:
    config = LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights="orthogonal")
    layer = get_peft_model(base_model("none"), config).base_model.model.model.layers[0].mlp.up_proj
    torch.manual_seed(5)
    layer.orthogonal_init("default")
    wanted = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    torch.manual_seed(5)
    a, b = (torch.empty_like(weight) for weight in wanted)
    orthogonal_start(a, b)
    assert torch.equal(a, wanted[0]) and torch.equal(b, wanted[1])
    layer = attach_lora(base_model(), LoraSection(r=4, init="orthogonal"), seed=0).base_model.model.model.layers[0]
    a, b = layer.mlp.up_proj.lora_A["default"].weight, layer.mlp.up_proj.lora_B["default"].weight
    assert (b @ a).abs().max() < 1e-6 < b.abs().mean()


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_a_start_that_would_change_the_base_is_refused_by_name(start: str) -> None:
    with pytest.raises(ValidationError, match=f"lora.init={start} "):
        LoraSection(init=start)


def test_an_expression_that_a_comma_cuts_is_told_from_one_that_is_wrong() -> None:
    with pytest.raises(ValidationError, match="A comma ends an entry"):
        LoraSection(targets=["re:(q", "k)_proj"])
    with pytest.raises(ValidationError, match="unterminated") as caught:
        LoraSection(targets=["q_proj", "re:(q"])
    assert "comma" not in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["re:nothing"]}, "re:nothing matched nothing"),
        ({"targets": [r"re:.*\d{1", r"2}\..*q_proj"]}, "\nA comma ends an entry"),
        ({"layers": ["0-3"]}, "layers 0-2; 3 is none"),
        ({"layers": ["1"], "targets": [r"re:model\.layers\.0\..*_proj"]}, "none is in both"),
        ({"rank_pattern": {"lm_head": 2}}, "lora.rank_pattern must match adapted modules; lm_head"),
        ({"alpha_pattern": {"q_proj": 2.0, "[qk]_proj": 3.0}}, "q_proj has q_proj and"),
    ],
)
def test_what_matches_nothing_or_twice_is_refused(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("[", r"\[")):
        check_targets(empty_model(small_config(num_hidden_layers=3)), LoraSection(**lora))


def test_targets_and_layers_choose_the_linears_that_peft_chooses() -> None:
    lora = LoraSection(targets=["all-linear"], layers=["0", "2"])
    names = adapted_linears(empty_model(small_config(num_hidden_layers=3)), lora)
    peft, _ = stock({"target_modules": "all-linear"})
    whole = {name.split(".lora_A")[0].removeprefix("base_model.model.") for name in gradients(peft) if "lora_A" in name}
    assert {*names} == {name for name in whole if ".layers.1." not in name} and len(names) == 14
