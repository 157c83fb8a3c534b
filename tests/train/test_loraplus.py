"""LoRA+: B learns at its own rate, as PEFT's optimizer does it; a resume, with NEFTune and trained tokens too, is
bit-equal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from launcher.recipe.schema import TrainSection
from launcher.train.optim import make_optimizer
from tests.support.models import build
from tests.support.runs import adapter, lines, trained

RATIO, LR = 16.0, 1e-3


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


def adapted() -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    peft = get_peft_model(Two(), LoraConfig(r=2, target_modules=["linear"], use_dora=True))
    named = [(name, p) for name, p in peft.named_parameters() if p.requires_grad]
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    return [("model", peft), *named]  # type: ignore[list-item]


def test_an_update_is_that_of_pefts_loraplus_optimizer() -> None:
    (_, peft), *theirs = adapted()
    settings = {"lr": LR, "weight_decay": 0.0, "loraplus_lr_ratio": RATIO}
    create_loraplus_optimizer(peft, torch.optim.AdamW, **settings).step()
    (_, model), *ours = adapted()
    for name, parameter in ours:
        if "lora_A" not in name:
            parameter.rate_factor = RATIO
    lr = torch.tensor(LR)
    make_optimizer(model, TrainSection(steps=1, lr=LR), lr=lr).step()
    for (name, one), (_, other) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_b_and_magnitudes_of_a_built_model_have_the_factor_and_a_has_not(make_recipe: Any) -> None:
    built = build(make_recipe(lora={"plus_ratio": RATIO, "dora": True}))
    factors = {
        (n.split(".")[-3], getattr(p, "rate_factor", 1.0)) for n, p in built.peft.named_parameters() if p.requires_grad
    }
    assert factors == {("lora_A", 1.0), ("lora_B", RATIO), ("lora_magnitude_vector", RATIO)}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_the_schedule_moves_both_rates_and_a_ratio_of_one_changes_nothing(
    make: Any, tmp_path: Path, optimizer: str
) -> None:
    train = {"steps": 3, "save_every": 0, "optimizer": optimizer}
    for folder, ratio in (("plain", None), ("one", 1.0), ("plus", RATIO)):
        trained(make(folder, train=train, lora={} if ratio is None else {"plus_ratio": ratio}))
    assert adapter(tmp_path / "plain") == adapter(tmp_path / "one") != adapter(tmp_path / "plus")
    rates = [[line["lr"] for line in lines(tmp_path / name) if "lr" in line] for name in ("plain", "plus")]
    assert rates[0] == rates[1]  # A's


def test_a_resumed_run_with_loraplus_neftune_and_trained_tokens_is_bit_equal(make: Any, tmp_path: Path) -> None:
    lora = {"plus_ratio": RATIO, "trainable_tokens": ["<|end|>", "<|user|>"]}
    sections: Any = {"lora": lora, "train": {"neftune_alpha": 5.0}}
    for folder in ("whole", "cut"):
        trained(
            make(folder, **{name: dict(keys) for name, keys in sections.items()}), until=6 if folder == "cut" else None
        )
    trained(make("cut", **{name: dict(keys) for name, keys in sections.items()}))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
