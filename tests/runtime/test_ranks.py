import pytest

from launcher.errors import ContractError
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
