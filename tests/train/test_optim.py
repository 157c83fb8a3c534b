"""Every optimizer and schedule of the recipe is the library's own, with the arguments that the recipe shows."""

import inspect
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Adafactor
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from launcher.errors import RecipeError
from launcher.memory.forecast import optimizer_bytes
from launcher.recipe.train_options import OPTIMIZERS, SCHEDULES
from launcher.recipe.train_section import TrainSection
from launcher.train import optim
from launcher.train.optim import (
    FIXED,
    LIBRARIES,
    check_optimizer,
    gates_on_device,
    init_state,
    make_optimizer,
    optimizer_class,
    parameter_groups,
    schedule,
)

CPU = torch.device("cpu")
ON_CPU = [name for name in LIBRARIES if not name.startswith("paged")]


class Adapted(nn.Module):
    """Stands for a model with two adapters of rank `r`, a trained vector and a frozen weight."""

    def __init__(self, r: int = 2, width: int = 8, *, vector: bool = True) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)
        self.lora_A = nn.Parameter(torch.linspace(-1, 1, r * width).view(r, width))
        self.lora_B = nn.Parameter(torch.zeros(width, r))
        if vector:
            self.magnitude = nn.Parameter(torch.ones(width))

    def with_gradients(self, value: float = 0.3) -> "Adapted":
        torch.manual_seed(0)
        for parameter in (p for p in self.parameters() if p.requires_grad):
            parameter.grad = value * torch.randn_like(parameter)
        return self


def section(**keys):
    return TrainSection(steps=10, lr=0.01, schedule="constant", **keys)


def test_the_recipe_its_options_and_the_libraries_have_the_same_names():
    fields = TrainSection.model_fields
    assert set(fields["optimizer"].annotation.__args__) == set(OPTIMIZERS) == set(LIBRARIES)
    assert set(fields["schedule"].annotation.__args__) == set(SCHEDULES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizers_options_are_arguments_of_its_class_with_the_same_defaults(name):
    arguments = inspect.signature(optimizer_class(name)).parameters
    options = section(optimizer=name).optimizer_parameters()
    for option, value in options.items():
        default = arguments[option].default
        assert value == (list(default) if isinstance(default, tuple) else default), option
    assert set(FIXED.get(name, {})) <= set(arguments)
    assert ("capturable" in arguments) == (name == "adamw"), "what could be captured is torch's AdamW alone"


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedules_options_are_arguments_of_transformers_function(name):
    function = TYPE_TO_SCHEDULER_FUNCTION["constant_with_warmup" if name == "constant" else name]
    ours = {"num_decay_steps", "min_lr_rate"}  # have no default there
    for option, field in SCHEDULES[name].model_fields.items():
        argument = inspect.signature(function).parameters[option]
        assert argument.default == field.default or option in ours, option


def rates_of(name, *, warmup=0, steps=10, **options):
    return schedule(
        TrainSection(steps=steps, lr=0.01, schedule=name, warmup=warmup, schedule_options=options or None), steps=steps
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_begins_with_the_warmup_and_never_exceeds_the_peak(name):
    rates = rates_of(name, warmup=4, steps=20)
    assert len(rates) == 21
    assert rates[:5] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01])
    assert max(rates) == pytest.approx(0.01) and min(rates) >= 0


def test_each_schedule_has_the_form_that_its_options_ask_for():
    assert rates_of("cosine_with_min_lr")[-1] == pytest.approx(0.001)
    assert rates_of("cosine_with_min_lr", min_lr_rate=0.5)[-1] == pytest.approx(0.005)
    assert rates_of("cosine_with_restarts", num_cycles=2)[5] == pytest.approx(0.01)
    assert rates_of("cosine", num_cycles=1)[5] == pytest.approx(0)
    assert rates_of("polynomial", power=2, lr_end=0)[5] == pytest.approx(0.01 / 4)
    assert rates_of("polynomial", lr_end=0.005)[-1] == pytest.approx(0.005)
    assert rates_of("inverse_sqrt", timescale=5)[5] == pytest.approx(0.01 * (5 / 10) ** 0.5)
    assert rates_of("inverse_sqrt")[-1] == pytest.approx(0.01, rel=1e-3)  # 10,000 steps
    falls = [later < earlier for earlier, later in pairwise(rates_of("warmup_stable_decay"))]
    assert falls == [False] * 8 + [True] * 2
    by_steps = rates_of("warmup_stable_decay", num_decay_steps=5, min_lr_ratio=0.2, decay_type="linear")
    assert by_steps[5:] == pytest.approx([0.01, 0.0084, 0.0068, 0.0052, 0.0036, 0.002])


def test_a_fall_longer_than_the_run_is_cut_to_what_the_warmup_leaves():
    assert rates_of("warmup_stable_decay", warmup=4, num_decay_steps=1000)[-1] == pytest.approx(0)
    assert len(rates_of("warmup_stable_decay", steps=1)) == 2


def test_a_longer_run_that_goes_on_has_the_longer_schedules_rates():
    short, long = (rates_of("warmup_stable_decay", steps=steps, num_decay_steps=2) for steps in (10, 20))
    assert long[:9] == short[:9], "the stable part is the same"
    assert long[10] == pytest.approx(0.01) and short[10] == 0


def test_matrices_alone_are_one_group_and_vectors_have_no_decay():
    groups = parameter_groups(Adapted(vector=False).named_parameters(), section(weight_decay=0.1), lr=0.01)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(3, 0.1)]
    assert len(parameter_groups(Adapted().named_parameters(), section(), lr=0.01)) == 1, "no decay, no second launch"
    [matrices, vectors] = parameter_groups(Adapted().named_parameters(), section(weight_decay=0.1), lr=0.01)
    assert [p.ndim for p in vectors["params"]] == [1] and vectors["weight_decay"] == 0
    assert {p.ndim for p in matrices["params"]} == {2}


@pytest.mark.parametrize("name", ON_CPU)
def test_weight_decay_shrinks_matrices_and_leaves_vectors(name):
    with_decay, without = (Adapted().with_gradients() for _ in range(2))
    for model, decay in ((with_decay, 0.5), (without, 0.0)):
        optimizer = make_optimizer(model, section(optimizer=name, weight_decay=decay), lr=0.01)
        if gates_on_device(optimizer):
            optimizer.found_inf = torch.zeros(())
        optimizer.step()
    assert torch.equal(with_decay.magnitude, without.magnitude)
    torch.testing.assert_close(without.lora_A - with_decay.lora_A, 0.01 * 0.5 * Adapted().lora_A, rtol=1e-3, atol=1e-6)
    assert torch.equal(with_decay.frozen, torch.ones(3, 3))


@pytest.mark.parametrize("name", ON_CPU)
def test_adapters_that_are_zero_move_by_about_the_rate(name):
    model = Adapted(r=16, width=64).with_gradients()
    optimizer = make_optimizer(model, section(optimizer=name), lr=0.01)
    if gates_on_device(optimizer):
        optimizer.found_inf = torch.zeros(())
    optimizer.step()
    moved = model.lora_B.detach().square().mean().sqrt()
    assert 0.1 * 0.01 < moved < 1.05 * 0.01, f"{name}: a rate of 0.01 moves B by {moved}"


def test_muon_has_the_matrices_of_lora_and_adamw_the_rest():
    model, stock = Adapted().with_gradients(), Adapted().with_gradients()
    optimizer = make_optimizer(model, section(optimizer="muon", optimizer_options={"momentum": 0.5}), lr=0.01)
    muon = torch.optim.Muon(
        [stock.lora_A, stock.lora_B], lr=0.01, weight_decay=0, momentum=0.5, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([stock.magnitude], lr=0.01, weight_decay=0)
    for _ in range(3):
        for one in (optimizer, muon, adamw):
            one.step()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert {len(state) for state in optimizer.state.values()} == {1, 3}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = model.lora_A.detach().clone()
    optimizer.step()
    assert torch.equal(model.lora_A, before), "a rate that is set reaches the inner optimizers"


def test_the_options_of_the_recipe_reach_the_optimizer():
    for name, options in (
        ("adamw", {"betas": [0.5, 0.6], "eps": 1e-3}),
        ("lion", {"betas": [0.5, 0.6]}),
        ("adafactor", {"clip_threshold": 2.0, "decay_rate": -0.5}),
        ("muon", {"nesterov": False, "ns_steps": 3}),
        ("schedule_free_adamw", {"betas": [0.5, 0.6], "eps": 1e-3, "r": 1.0, "weight_lr_power": 0.0}),
    ):
        optimizer = make_optimizer(Adapted(), section(optimizer=name, optimizer_options=options), lr=0.01)
        group = optimizer.param_groups[0]
        for option, value in options.items():
            assert group[option] == (tuple(value) if isinstance(group[option], tuple) else value), name


@pytest.mark.parametrize("name", ON_CPU)
def test_state_that_is_made_before_the_first_step_is_zero_and_changes_no_parameter(name):
    model, rank = Adapted(r=16, width=2048, vector=False).with_gradients(float("nan")), 16
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = make_optimizer(model, section(optimizer=name), lr=0.01)
    optimizer.found_inf = torch.zeros(())
    init_state(optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    states = [state for p in (model.lora_A, model.lora_B) for state in [optimizer.state[p]]]
    values = [(name, value) for state in states for name, value in state.items() if not name.startswith("qmap")]
    assert values and not any(torch.as_tensor(value).any() for name, value in values if name != "z")
    assert all(torch.equal(optimizer.state[p].get("z", p), p) for p in (model.lora_A, model.lora_B))
    tensors = [value for _, value in values if torch.is_tensor(value) and value.dim()]
    measured = sum(tensor.nbytes for tensor in tensors) / (model.lora_A.numel() + model.lora_B.numel())
    assert measured == pytest.approx(optimizer_bytes(name, rank), rel=0.01), "the forecast's bytes a parameter"


def test_an_optimizer_that_the_installed_library_lacks_is_refused_with_those_that_are_there(monkeypatch):
    check_optimizer(section(optimizer="muon"), CPU)
    monkeypatch.setitem(optim.LIBRARIES, "muon", ("torch.optim", "Planted"))
    with pytest.raises(RecipeError, match=r"muon is Planted of torch.optim, .*\nThose that are there: adamw, .*lion"):
        check_optimizer(section(optimizer="muon"), CPU)
    monkeypatch.setitem(optim.LIBRARIES, "lion", ("planted_library", "Lion"))
    with pytest.raises(RecipeError, match="upgrade planted_library"):
        check_optimizer(section(optimizer="lion"), CPU)
    with pytest.raises(RecipeError, match=r"pages its state .* Use train.optimizer=lion_8bit"):
        check_optimizer(section(optimizer="paged_lion_8bit"), CPU)
    check_optimizer(section(optimizer="paged_lion_8bit"), SimpleNamespace(type="cuda"))
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(
        RecipeError, match="is not installed.\n.*Use one, or run: pip install 'schedulefree>=1.4'"
    ) as caught:
        check_optimizer(section(optimizer="schedule_free_adamw"), CPU)
    there = str(caught.value).split("there: ")[1].split(". Use")[0]
    lacking = {"muon", "lion", "schedule_free_adamw"}
    assert set(there.split(", ")) == set(ON_CPU) - lacking, "what can be used here, and nothing else"


def test_adafactor_takes_the_recipes_rate_as_it_is():
    model, stock = Adapted().with_gradients(), Adapted().with_gradients()
    optimizer = make_optimizer(model, section(optimizer="adafactor"), lr=0.01)
    trained = [parameter for parameter in stock.parameters() if parameter.requires_grad]
    theirs = Adafactor(trained, lr=0.01, scale_parameter=False, relative_step=False)
    for _ in range(2):
        optimizer.step()
        theirs.step()
    assert all(map(torch.equal, model.parameters(), stock.parameters()))
