"""A run goes on only on the base that it was trained on, whatever its name."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.errors import CheckpointError
from launcher.records.run import EvalRecord, Note, RunRecord, StepRecord
from tests.conftest import ROOT
from tests.support.records import shown
from tests.support.runs import trained

pytestmark = pytest.mark.usefixtures("clean_dynamo")


def rewrite(base: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def flip_a_bit(tensors: dict[str, torch.Tensor]) -> None:
    """The last one of a tensor's last value."""
    bits = tensors["model.layers.1.mlp.down_proj.weight"].view(torch.int32)
    bits[-1, -1] ^= 1


def train_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight"].mul_(1.01)


def scale_a_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][7] = 2.0


def test_fault_33_another_base_is_refused(make_recipe: Callable[..., Any], small_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(small_model, base)
    sections: dict[str, Any] = {"model": {"name": str(base)}, "compile": {"mode": "off"}}
    trained(make_recipe(**sections, train={"steps": 2}))
    longer = make_recipe(**sections, train={"steps": 3})
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for change in (flip_a_bit, train_one, scale_a_norm):
        rewrite(base, change)
        with pytest.raises(CheckpointError, match=r"these differ:\nbase: '\w{16}' in the state, '\w{16}' here\n"):
            trained(longer)
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
        shutil.copytree(small_model, base, dirs_exist_ok=True)
    reshard(base)
    trained(longer)  # the same weights in other files are the same base


def reshard(base: Path) -> None:
    """Save the same tensors in several files."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="1MB")
    assert not (base / "model.safetensors").exists()


@pytest.mark.parametrize("change", [0.0, 300.0, None])
def test_a_damaged_base_is_noted_at_its_first_loss_and_in_the_report(
    make_recipe: Callable[..., Any], tmp_path: Path, change: float | None
) -> None:
    base = tmp_path / "base"
    shutil.copytree(ROOT / "recipes" / "tiny" / "base", base)
    if change is not None:
        rewrite(base, lambda tensors: [tensor.mul_(change) for tensor in tensors.values()])
    events = trained(make_recipe(model={"name": str(base)}, compile={"mode": "off"}, train={"steps": 1}))
    notes = [event.text for event in events if isinstance(event, Note)]
    record = events[-1]
    assert isinstance(record, RunRecord) and record.as_report()["notes"] == record.notes == tuple(notes)
    assert len(notes) == (change is not None)
    kinds = [type(event) for event in events if isinstance(event, EvalRecord | Note | StepRecord)]
    assert kinds[:2] == [EvalRecord, Note if notes else StepRecord]
    assert bool(notes) == ("should predict better than a guess" in shown(record))
