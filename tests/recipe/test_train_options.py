"""Options of a schedule or an optimizer: what is not taken is refused before torch is imported, naming what is."""

import pytest

from launcher.errors import RecipeError
from launcher.recipe.load import resolve


def problem_of(*words):
    with pytest.raises(RecipeError) as caught:
        resolve(["recipe=tiny", *words])
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train.schedule_options={power: 2}"], "=cosine must be of: num_cycles (waves of the cosine, > 0); got power"),
        (["train.schedule=linear", "train.schedule_options={power: 2}"], "2; leave train.schedule_options out"),
        (["train.schedule=polynomial", "train.schedule_options={power: -1}"], "power (exponent, > 0)"),
        (["train.schedule=polynomial", "train.schedule_options={lr_end: 0.5}"], "got 0.5 and 0.002"),
        (["train.schedule=polynomial", "train.lr=1e-8"], "lr_end below train.lr; got 1e-07 and 1e-08"),
        (["train.schedule=cosine_with_restarts", "train.schedule_options={num_cycles: 1.5}"], "got num_cycles: 1.5"),
        (["train.schedule_options=2"], "must be names and values, as {name: value}, or null; got '2'"),
        (["train.schedule_options.power=2"], "did you mean train.schedule_options"),
        (["train.optimizer_options={betas: [0.9, 1.5]}"], "_options={betas: [0.9, 0.999], eps: 1e-08}'"),
        (["train.optimizer_options={betas: [0.9]}"], "betas (two numbers >= 0 and < 1)"),
        (["train.optimizer=muon", "train.optimizer_options={ns_steps: 0}"], "nesterov: true, ns_steps: 5"),
        (["train.optimizer=sgd"], "one of adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, adafactor, lion"),
        (["train.schedule=wsd", "train.schedule_options={num_decay_steps: 2}"], "cosine_with_min_lr, polynomial"),
    ],
)
def test_options_that_are_not_taken_are_refused_with_those_that_are(words, says):
    assert says in problem_of(*words)


def test_options_are_kept_as_numbers_and_the_others_have_their_defaults():
    words = ["train.schedule=polynomial", "train.schedule_options={power: 2}", "train.optimizer_options={eps: 1e-6}"]
    train = resolve(["recipe=tiny", *words]).recipe.train
    assert (train.schedule_options, train.optimizer_options) == ({"power": 2.0}, {"eps": 1e-6})
    assert train.schedule_parameters() == {"power": 2.0, "lr_end": 1e-7}
    assert train.optimizer_parameters() == {"betas": [0.9, 0.999], "eps": 1e-6}


def test_no_options_given_are_none_so_that_a_resume_compares_them():
    """An empty mapping would be equal to any other where identities are compared (train/state.py)."""
    assert resolve(["recipe=tiny", "train.schedule_options={}"]).recipe.train.schedule_options is None
