from dataclasses import replace

import pytest
import torch
import torch._dynamo

from launcher.errors import RecipeError
from launcher.memory.forecast import Kept, Shapes, forecast, layers_mib
from launcher.memory.ledger import MIB
from launcher.memory.policy import KEPT, Policy, applied, check_policy, choose_policy
from launcher.train import inputs
from tests.conftest import request_for
from tests.support.models import build
from tests.support.tensors import saved_for_backward

CUDA = torch.device("cuda", 0)

LLAMA_1B = Shapes(
    layers=16, tokens=4096, hidden=2048, query=2048, key_value=512, intermediate=8192, vocabulary=128256,
    loss_chunk=1024, itemsize=2, trainable=11_272_192,
)  # fmt: skip


def kept_and_gradients(recipe, policy, *, seed=0):
    """Bytes that a compiled forward pass keeps, without weights, and the gradients of the backward pass after it."""
    torch._dynamo.reset()
    built = build(recipe)
    parameters = [p for p in built.packed.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05)
    for layer in built.packed.body.layers:
        layer.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    ids = torch.arange(128).view(2, 64)
    positions, documents = torch.arange(64).expand(2, 64), torch.zeros(2, 64, dtype=torch.int32)
    batch = (ids, ids.roll(-1, 1), positions, documents, torch.tensor([0, 64, 128], dtype=torch.int32))
    with applied(policy):
        built.packed(*batch).backward()  # compiles
        for parameter in parameters:
            parameter.grad = None
        torch.manual_seed(seed)
        with saved_for_backward(but=[*built.packed.parameters(), *built.packed.buffers()]) as sizes:
            loss = built.packed(*batch)
        loss.backward()
    return sum(sizes.values()), [p.grad.clone() for p in parameters]


def test_each_policy_keeps_less_than_the_one_before_and_gives_its_gradients(make_recipe):
    runs = {name: kept_and_gradients(make_recipe(), Policy(name, kept, "", None)) for name, kept in KEPT.items()}
    sizes = [size for size, _ in runs.values()]
    assert sizes[0] > sizes[1] > 2 * sizes[2] > 0
    for _, gradients in runs.values():
        torch.testing.assert_close(gradients, runs["none"][1], rtol=1e-4, atol=1e-6)


def test_dropout_draws_one_mask_under_the_policies_that_are_allowed_with_it(make_recipe):
    recipe = make_recipe(lora={"r": 4, "dropout": 0.5})
    gradients = [kept_and_gradients(recipe, Policy(n, KEPT[n], "", None), seed=3)[1] for n in ("none", "selective")]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    other = kept_and_gradients(recipe, Policy("none", KEPT["none"], "", None), seed=4)[1]
    assert not torch.allclose(other[0], gradients[0][0])


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"memory": {"activations": "full"}, "lora": {"dropout": 0.1}}, "lora.dropout is 0.1"),
        ({"memory": {"budget": 0.5}, "lora": {"dropout": 0.1}}, "memory.budget recomputes"),
        ({"memory": {"activations": "full"}, "compile": {"mode": "off"}}, "compile.mode is off"),
        ({"memory": {"activations": "selective"}, "compile": {"mode": "off"}}, "compile.mode is off"),
        ({"memory": {"activations": "full"}, "compile": {"scope": "model"}}, "compile.scope=layer"),
        ({"memory": {"activations": "full"}, "compile": {"scope": "regions"}}, "compile.scope=layer"),
        ({"memory": {"budget": 0.3}, "compile": {"scope": "regions"}}, "compile.scope=layer"),
        ({"memory": {"activations": "offload"}, "lora": {"dropout": 0.1}}, "lora.dropout is 0.1"),
        ({"memory": {"activations": "offload"}, "compile": {"mode": "off"}}, "compile.mode is off"),
        ({"memory": {"activations": "offload"}, "compile": {"scope": "model"}}, "compile.scope=layer"),
        ({"memory": {"activations": "offload"}, "compile": {"scope": "regions"}}, "compile.scope=layer"),
    ],
)
def test_a_policy_that_the_recipe_does_not_allow_is_refused(make_recipe, sections, reason):
    with pytest.raises(RecipeError, match=reason):
        check_policy(make_recipe(**sections), CUDA)
    allowed = {**sections, "memory": {"activations": "none"}}
    check_policy(make_recipe(**allowed), CUDA)


def test_offload_is_refused_on_a_cpu_before_data_is_read(make_recipe, monkeypatch):
    monkeypatch.setattr(inputs, "prepare_data", lambda *_, **__: pytest.fail("data was read"))
    recipe = make_recipe(memory={"activations": "offload"})
    with pytest.raises(RecipeError, match="the device is cpu, its memory is the host's.\nUse memory.activations=full"):
        inputs.prepare_inputs(request_for(recipe))
    check_policy(recipe, CUDA)


def test_a_budget_and_offload_exclude_each_other(make_recipe):
    with pytest.raises(ValueError, match="got 0.3 and offload; give one"):
        make_recipe(memory={"activations": "offload", "budget": 0.3})


def test_auto_takes_the_fastest_policy_that_fits_and_the_smallest_where_none_does(make_recipe):
    recipe = make_recipe()

    def chosen(free, recipe=recipe):
        return choose_policy(recipe, LLAMA_1B, held_mib=1057, free_mib=free)

    names = [chosen(free).name for free in (140_000, 4_200, 2_000, 900, 100)]
    assert names == ["none", "selective", "full", "offload", "offload"]
    assert "nothing is forecast to fit" in chosen(100).why
    assert chosen(900).why == "auto: the fastest that fits" and chosen(900).kept.on_host
    assert chosen(None) == Policy("none", KEPT["none"], "auto", None)
    with_dropout = make_recipe(lora={"dropout": 0.1})
    assert chosen(2_000, with_dropout).name == "selective"
    assert chosen(2_000, make_recipe(compile={"scope": "regions"})).name == "selective"
    assert chosen(2_000, make_recipe(compile={"mode": "off"})) == Policy("none", KEPT["none"], "auto", None)


def test_the_forecast_grows_with_what_is_kept_and_with_the_batch():
    peaks = [
        forecast(LLAMA_1B, kept, held_mib=1057)
        for kept in (KEPT["offload"], KEPT["full"], Kept(0.3, False), KEPT["selective"], KEPT["none"])
    ]
    assert peaks == sorted(peaks) and peaks[0] > 1057
    assert peaks[1] - peaks[0] == (LLAMA_1B.layers - 3) * 16  # MiB of an input
    shallow = replace(LLAMA_1B, layers=2)
    assert forecast(shallow, KEPT["offload"], held_mib=1057) == forecast(shallow, KEPT["full"], held_mib=1057)
    assert forecast(replace(LLAMA_1B, tokens=8192), KEPT["none"], held_mib=1057) > 1.6 * (peaks[-1] - 1057)


@pytest.mark.parametrize("name", ["none", "selective"])
def test_the_forecast_includes_what_dropout_keeps(make_recipe, name):
    kept, forecasts = [], []
    for dropout in (0.0, 0.1):
        recipe = make_recipe(lora={"r": 4, "dropout": dropout})
        kept.append(kept_and_gradients(recipe, Policy(name, KEPT[name], "", None))[0] / MIB)
        shapes = Shapes(tokens=2 * 64, **build(recipe).sizes())
        forecasts.append(forecast(shapes, KEPT[name], held_mib=0))
    more, expected = kept[1] - kept[0], forecasts[1] - forecasts[0]
    assert more > 0.4  # MiB: half of what is kept without dropout
    assert 0.6 * more < expected < 1.2 * more


@pytest.mark.parametrize("name", ["none", "selective"])
def test_the_forecast_includes_the_repeated_heads_and_the_one_mask_of_masked_attention(make_recipe, name):
    kept = {n: kept_and_gradients(make_recipe(), Policy(n, KEPT[n], "", None))[0] / MIB for n in (name, "full")}
    built = build(make_recipe())
    assert built.attention == "sdpa" and built.sizes()["repeated"] == 64
    shapes = Shapes(tokens=2 * 64, masked=64, **built.sizes())
    more = layers_mib(shapes, KEPT[name]) - layers_mib(shapes, KEPT["full"])  # embedding, norm and loss keep as much
    assert more == pytest.approx(kept[name] - kept["full"], rel=0.03)
    without = replace(shapes, masked=0)
    mask_mib = 2 * 64 * 64 * 4 / MIB
    assert forecast(shapes, KEPT[name], held_mib=0) - forecast(without, KEPT[name], held_mib=0) == pytest.approx(
        mask_mib
    )
