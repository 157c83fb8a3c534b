"""lora.init=pissa and olora on the base as it is: the start is the base bit for bit, the gradients are those of the
papers' form, and the optimizer sees the trained half alone."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from pydantic import ValidationError
from torch import Tensor, nn

from launcher.errors import RecipeError
from launcher.model import lora_start, low_rank
from launcher.model.load import empty_model
from launcher.model.lora import stock_lora
from launcher.model.lora_start import first_factors, start_parameters
from launcher.model.lora_targets import check_targets
from launcher.ops import qlora_linear
from launcher.recipe.lora_section import LoraSection
from launcher.recipe.schema import TrainSection
from launcher.train.optim import make_optimizer
from tests.conftest import small_config
from tests.support.lora_starts import VARIANTS, alone_loss, base_model, moved, noise, ours, packed_loss


class Papers(nn.Module):
    """The residual and an adapter, as PiSSA and OLoRA state it, in plain torch. `like`: the signs of singular vectors
    are free, and are taken from here."""

    def __init__(self, weight: Tensor, like: tuple[Tensor, Tensor], scaling: float, init: str) -> None:
        super().__init__()
        self.scaling, rank = scaling, like[0].shape[0]
        if init == "olora":
            q, r = torch.linalg.qr(weight.double())
            a, b = r[:rank], q[:, :rank]
        else:
            u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
            a, b = (s[:rank] / scaling).sqrt()[:, None] * vt[:rank], u[:, :rank] * (s[:rank] / scaling).sqrt()
        signs = (a * like[0]).sum(1).sign()
        a, b = signs[:, None] * a, b * signs
        self.residual = (weight.double() - scaling * b @ a).float()
        self.a, self.b = nn.Parameter(a.float()), nn.Parameter(b.float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.residual) + self.scaling * F.linear(F.linear(x, self.a), self.b)


@torch.no_grad()
def papers_model(lora: dict[str, Any], peft: Any, *, quant: str) -> tuple[Any, dict[str, nn.Parameter]]:
    """The plain model of the papers with ranks and scales as `peft` has them, moved as by `moved`; its parameters by
    the names of ours."""
    model, parameters = base_model(quant), {}
    for path, layer in peft.named_modules():
        if hasattr(layer, "lora_A"):
            linear = model.get_submodule(path.removeprefix("base_model.model."))
            weight = linear.weight.detach()
            if isinstance(linear, Linear4bit):
                state = copy.copy(linear.weight.quant_state)
                state.dtype = torch.float32
                weight = dequantize_4bit(linear.weight.data, state)
            like = layer.lora_A["start"].weight, layer.lora_B["start"].weight
            one = Papers(weight, like, layer.scaling["default"], lora["init"])
            model.set_submodule(path.removeprefix("base_model.model."), one)
            for letter, parameter in (("A", one.a), ("B", one.b)):
                name = f"{path}.lora_{letter}.default.weight"
                parameter.add_(noise(name, parameter.shape))
                parameters[name] = parameter
    return model, parameters


def largest_error(lora: dict[str, Any], *, quant: str = "nf4") -> float:
    """Of loss and gradients of our model against the papers' form, relative."""
    peft = moved(ours(lora, quant=quant))
    model, parameters = papers_model(lora, peft, quant=quant)
    loss, expected = packed_loss(peft), alone_loss(model)
    loss.backward()
    expected.backward()
    trained = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    assert trained.keys() == parameters.keys() and len(trained) >= 28
    errors = [float((p.grad - parameters[n].grad).norm() / parameters[n].grad.norm()) for n, p in trained.items()]
    return max(float((loss - expected).detach().abs() / expected.detach()), *errors)


@pytest.mark.parametrize("quant", ["nf4", "none"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_those_of_the_papers_form_after_every_weight_has_moved(variant: str, quant: str) -> None:
    assert largest_error(VARIANTS[variant], quant=quant) < 2e-4  # fp32: A and B are large, the residual is rounded


@pytest.mark.parametrize("fault", ["other components", "start kept", "gradient of the move alone"])
def test_a_fault_in_start_or_gradient_is_seen_by_that_comparison(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "other components":

        def last(weight: Tensor, rank: int, **_: Any) -> Any:
            u, s, v = low_rank.leading_svd(weight, min(weight.shape), seed=0)
            return u[:, -rank:], s[-rank:], v[-rank:]

        monkeypatch.setattr(lora_start, "leading_svd", last)
    elif fault == "start kept":
        monkeypatch.setattr(qlora_linear, "update_factors", lambda a, b, count: (a[:count], b[:count]))
    else:
        plain = qlora_linear.gradients
        monkeypatch.setattr(qlora_linear, "gradients", lambda dy, x, a, b, s: plain(dy, x, a, [0.5 * q for q in b], s))
    assert not largest_error({"init": "pissa"}) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lora", [{}, {"dropout": 0.3}], ids=["", "dropout"])
@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
def test_the_start_is_the_base_bit_for_bit(init: str, lora: dict[str, Any], dtype: torch.dtype) -> None:
    peft = ours({**lora, "init": init}, dtype=dtype)
    found = packed_loss(peft)
    assert torch.equal(found, packed_loss(ours(lora, dtype=dtype)))
    with torch.no_grad():
        for parameter in start_parameters(peft).values():
            parameter.mul_(1.2)
    assert not torch.equal(found, packed_loss(peft))


def test_only_the_trained_half_is_an_optimizers() -> None:
    peft = moved(ours({"init": "pissa", "plus_ratio": 4.0}))
    frozen = {name: parameter.clone() for name, parameter in start_parameters(peft).items()}
    assert len(frozen) == 42 and not any(parameter.requires_grad for parameter in start_parameters(peft).values())
    packed_loss(peft).backward()
    for name in ("adamw", "lion", "adafactor", "muon"):
        train = TrainSection(steps=1, optimizer=name, weight_decay=0.5, lr=0.1)
        optimizer = make_optimizer(peft, train, lr=0.1)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert len(held) == 42 and not held & {id(parameter) for parameter in start_parameters(peft).values()}, name
        optimizer.step()
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in start_parameters(peft).items())
    factors = {getattr(p, "rate_factor", 1.0) for n, p in peft.named_parameters() if ".lora_B.default" in n}
    assert factors == {4.0}


def test_the_randomised_svd_is_seeded_and_nears_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight with a long tail, which a large model's are."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 96, generator=generator))[0] for n in (160, 96))
    weight = u @ (torch.arange(1, 97) ** -0.5)[:, None].mul(v.T)

    def product(init: str) -> Tensor:
        a, b = first_factors(weight, 8, 2.0, init, seed=1)
        return 2.0 * b @ a

    best = product("pissa")
    torch.testing.assert_close(best, u[:, :8] @ (torch.arange(1, 9) ** -0.5)[:, None].mul(v[:, :8].T))
    errors = [float((product(f"pissa_niter_{n}") - best).norm() / best.norm()) for n in (0, 2, 16)]
    assert errors[0] > 3 * errors[1] > 30 * errors[2], errors
    assert torch.equal(product("pissa_niter_2"), product("pissa_niter_2"))
    monkeypatch.setattr(low_rank, "EXACT_UP_TO", 95)
    assert torch.equal(product("pissa"), product("pissa_niter_16")) and not torch.equal(product("pissa"), best)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"init": "pissa", "dora": True}, "lora.dora needs an adapter that begins at zero; got lora.init=pissa"),
        ({"init": "olora", "r": 513}, "rank 2r, at most 1024; r is 513"),
        ({"init": "pissa", "rank_pattern": {"q_proj": 600}}, "at most 1024; r is 600"),
        ({"init": "pissa", "start_from": "./a"}, "lora.start_from takes the place of lora.init"),
        ({"init": "pissa_niter_x"}, "pissa_niter"),
    ],
)
def test_what_cannot_be_exact_is_refused(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LoraSection(**lora)


def test_a_rank_beyond_the_components_of_a_weight_is_refused() -> None:
    model = empty_model(small_config())
    check_targets(model, LoraSection(r=64, init="pissa", rank_pattern={"[kv]_proj": 32}))
    with pytest.raises(RecipeError, match=r"k_proj has 32, its\s+rank is 64"):
        check_targets(model, LoraSection(r=64, init="pissa"))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_weight_with_fewer_components_than_the_rank_is_refused_where_a_and_b_would_stay_zero(init: str) -> None:
    """As the projections of blocks that were added to a model, which begin at zero."""
    base = base_model("none")
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight[2:] = 0
    if init == "olora":  # its B is orthonormal all the same
        stock_lora(base, LoraSection(r=4, init=init), seed=0)
        return
    with pytest.raises(RecipeError, match=r"model\.layers\.1\.mlp\.down_proj has 2, its\s+rank is 4"):
        stock_lora(base, LoraSection(r=4, init=init), seed=0)
