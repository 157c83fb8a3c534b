"""Ranks that begin with different weights are told apart, as nothing later would make them alike."""

import pytest
import torch
from torch import nn

from launcher.errors import ContractError
from launcher.runtime import agreement as likeness
from launcher.runtime.agreement import check_alike, digest_of


def test_a_digest_changes_with_any_bit_of_a_trained_weight_and_with_no_other():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    digest = digest_of(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert digest_of(model) == digest
    with torch.no_grad():
        model[1].bias[2] = torch.nextafter(model[1].bias[2], torch.tensor(9.0))
    assert digest_of(model) != digest


def test_a_rank_that_differs_is_shown_beside_the_others(monkeypatch):
    told = {"error": ContractError, "remedy": "Do that."}
    check_alike("start from the same adapter", "a" * 64, **told)
    monkeypatch.setattr(likeness, "gather", lambda own: [own, "other"])
    with pytest.raises(
        ContractError, match="every rank must start from the same adapter; they differ:\nrank 0: aaaa"
    ) as e:
        check_alike("start from the same adapter", "a" * 64, **told)
    assert str(e.value).endswith("rank 1: other\nDo that.")
