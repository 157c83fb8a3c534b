"""train.deterministic: torch is told while the run lasts, and everything that asks torch obeys."""

import os

import pytest
import torch

from launcher.model.attention import choose_attention, cudnn_missing
from launcher.ops import adapter_gradients
from tests.support.runs import events_of
from tests.support.workers import built

pytestmark = pytest.mark.usefixtures("clean_dynamo")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_torch_is_deterministic_as_long_as_the_run_lasts_and_the_losses_are_the_same(make_recipe, tmp_path, batching):
    def run(name, **train):
        sections = {"train": train, "data": {"batching": batching}, "lora": {"r": 4, "dropout": 0.1}}
        return events_of(make_recipe(**sections, run={"output_dir": str(tmp_path / name)}))[-1]

    plain, deterministic = run("plain"), run("deterministic", deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert [s.loss for s in deterministic.steps] == [s.loss for s in plain.steps]
    assert all(verdict.holds for verdict in deterministic.verdicts)


def test_what_the_user_had_set_is_put_back(make_recipe):
    for before in (False, True):
        torch.use_deterministic_algorithms(before, warn_only=before)
        worker = built(make_recipe(train={"deterministic": True}))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        worker.release()
        assert torch.are_deterministic_algorithms_enabled() == before
        assert torch.is_deterministic_algorithms_warn_only_enabled() == before


def test_cudnn_attention_is_neither_chosen_nor_allowed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    place = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head": 64}
    assert cudnn_missing(**place) is None
    assert choose_attention("auto", **place, alone=True)[0] == "cudnn"
    torch.use_deterministic_algorithms(True)
    assert "no deterministic backward pass" in (cudnn_missing(**place) or "")
    assert choose_attention("auto", **place, alone=True)[0] == "varlen"


def test_adapter_gradients_add_in_one_order(monkeypatch):
    monkeypatch.setattr(adapter_gradients, "HAS_TRITON", True)
    monkeypatch.setattr(adapter_gradients, "plain_gradients", lambda dy, x, a, b, scaling: (a, b))

    class OnCuda(torch.Tensor):
        is_cuda = True

    x = torch.zeros(4, 8, dtype=torch.bfloat16).as_subclass(OnCuda)
    dy, a, b = torch.zeros(4, 16, dtype=torch.bfloat16), torch.ones(2, 8), torch.ones(16, 2)
    torch.use_deterministic_algorithms(True)
    da, db = adapter_gradients.gradients(dy, x, [a], [b], 1.0)
    assert torch.equal(da, a) and torch.equal(db, b)
    torch.use_deterministic_algorithms(False)
    with pytest.raises(Exception):  # noqa: B017  # the kernels, which this machine may not have
        adapter_gradients.gradients(dy, x, [a], [b], 1.0)
