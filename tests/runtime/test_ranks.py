import pytest

from launcher.errors import ContractError, RecipeError
from launcher.runtime import ranks


def test_a_rank_that_differs_is_shown_beside_the_others(monkeypatch):
    def check():
        ranks.check_same_on_all_ranks("start from one adapter", "a" * 64, error=ContractError, remedy="Do that.")

    monkeypatch.setattr(ranks, "gather", lambda value: [value, value])
    check()
    monkeypatch.setattr(ranks, "gather", lambda value: [value, "other"])
    with pytest.raises(ContractError) as caught:
        check()
    lines = ["every rank must start from one adapter; they differ:", "rank 0: " + "a" * 16, "rank 1: other", "Do that."]
    assert str(caught.value).splitlines() == lines


def test_the_error_of_one_rank_is_raised_on_every_rank(monkeypatch):
    monkeypatch.setattr(ranks, "gather", lambda value: [None, value, ContractError("of the third rank")])
    with pytest.raises(ContractError, match="of the third rank"), ranks.failing_together(ContractError):
        pass
    with pytest.raises(ContractError, match="its own"), ranks.failing_together(ContractError):
        raise ContractError("its own")
    monkeypatch.setattr(ranks, "gather", lambda value: [None, value])
    with ranks.failing_together(ContractError):
        pass


ALL = {
    "RANK": "1",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}


@pytest.fixture
def rank_variables(monkeypatch):
    """A function that sets these variables of a process launcher and removes the others."""

    def change(**variables):
        for name in ALL:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "abc"}, {"RANK": "2"}, {"RANK": "-1"}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "0"},
        {"LOCAL_RANK": "1"}, {"LOCAL_WORLD_SIZE": "3"}, {"LOCAL_WORLD_SIZE": ""}, {"MASTER_PORT": "x"},
        {"MASTER_PORT": "70000"}, {"MASTER_ADDR": ""}, {"RANK": ""}, {"LOCAL_RANK": ""}, {"WORLD_SIZE": ""},
    ],
    ids=str,
)  # fmt: skip
def test_variables_of_a_launcher_that_do_not_fit_together_are_refused(rank_variables, wrong):
    rank_variables(**ALL)
    assert ranks.rank_info() == ranks.RankInfo(1, 0, 2, 1)
    rank_variables(**{**ALL, **wrong})
    if wrong == {"LOCAL_WORLD_SIZE": ""}:  # optional: then all are on this machine
        assert ranks.rank_info() == ranks.RankInfo(1, 0, 2, 2)
        return
    with pytest.raises(RecipeError, match="must be there together") as caught:
        ranks.rank_info()
    name, value = next(iter(wrong.items()))
    assert f"{name}={value or '(unset)'}" in str(caught.value) and "unset RANK" in str(caught.value)


def test_a_single_process_needs_no_variable_and_a_cluster_may_set_some(rank_variables):
    for variables in ({}, {"WORLD_SIZE": "1", "RANK": "0"}, {"MASTER_ADDR": "a", "MASTER_PORT": "1"}):
        rank_variables(**variables)
        assert ranks.rank_info() == ranks.RankInfo(0, 0, 1, 1)
