"""The saved adapter of lora.init=pissa and olora: plain LoRA of rank 2r, as stock PEFT takes it, proved bit by bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from launcher.checkpoint.adapter import holds_adapter, prove_adapter, save_tensors
from launcher.checkpoint.start_adapter import check_start, load_start
from launcher.errors import CheckpointError, RecipeError
from launcher.model.lora_start import start_parameters
from launcher.recipe.lora_section import LoraSection
from tests.support.lora_starts import VARIANTS, alone_loss, base_model, moved, ours, packed_loss


@torch.no_grad()
def with_signs_of(peft: PeftModel, theirs: PeftModel) -> None:
    """A singular vector and its opposite are both right: give each pair of `theirs` the sign that `peft` has."""
    mine, parameters = dict(peft.named_parameters()), dict(theirs.named_parameters())
    for name, a in parameters.items():
        if ".lora_A." in name:
            signs = (a * mine[name]).sum(1).sign()
            a.mul_(signs[:, None])
            parameters[name.replace("_A", "_B")].mul_(signs)


TOKENS: dict[str, Any] = {"init": "pissa", "trainable_tokens": ["5", "7"]}


@pytest.mark.parametrize("lora", [*VARIANTS.values(), TOKENS], ids=[*VARIANTS, "tokens"])
def test_stock_peft_gives_the_saved_adapter_the_same_loss_on_the_same_base(
    lora: dict[str, Any], tmp_path: Path
) -> None:
    peft = moved(ours(lora))
    save_tensors(peft, None, tmp_path)
    assert holds_adapter(peft, tmp_path)
    loss = float(packed_loss(peft))
    prove_adapter(peft, tmp_path, loss=lambda: float(packed_loss(peft)))

    def stock() -> float:
        with torch.no_grad():
            return float(alone_loss(PeftModel.from_pretrained(base_model(), tmp_path).train()))  # in eval it repacks

    assert stock() == pytest.approx(loss, rel=1e-5)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    assert settings["r"] == 8 and settings["init_lora_weights"] is True
    file.write_text(json.dumps({**settings, "lora_alpha": settings["lora_alpha"] / 2, "alpha_pattern": {}}))
    assert stock() != pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_saved_adapter_is_pefts_own_conversion_and_keeps_its_digits_in_half_precision(
    init: str, tmp_path: Path
) -> None:
    """On an unquantised base, which PEFT's PiSSA demands."""
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["up_proj"], init_lora_weights=init, task_type="CAUSAL_LM")
    theirs = get_peft_model(base_model("none"), config)
    peft = ours({"init": init, "targets": ["up_proj"]}, quant="none")
    with_signs_of(peft, theirs)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "begun")
    theirs.peft_config["default"].init_lora_weights = init
    moved(theirs, 0.02).save_pretrained(
        tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "begun")
    )
    save_tensors(moved(peft, 0.02), None, tmp_path / "ours")
    one, other = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in other.items()}
    for name in one:
        if "lora_A" in name:
            (a, b), (their_a, their_b) = ([t[name], t[name.replace("_A", "_B")]] for t in (one, other))
            torch.testing.assert_close(b @ a, their_b @ their_a, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(a[:4], their_a[:4], rtol=1e-4, atol=1e-5)
            exact, rounded, theirs_rounded = (
                q.to(dtype).double() @ p.to(dtype).double()
                for q, p, dtype in ((b, a, torch.float32), (b, a, torch.bfloat16), (their_b, their_a, torch.bfloat16))
            )
            assert (rounded - exact).norm() < 0.005 * exact.norm() < 0.2 * (theirs_rounded - exact).norm()
    settings = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs")]
    assert all(settings[0][key] == settings[1][key] for key in ("r", "lora_alpha", "init_lora_weights", "rank_pattern"))


@pytest.mark.parametrize(("name", "change"), [("lora_A", 5), ("lora_B", 5), ("lora_A", 0)])
def test_a_saved_start_or_adapter_with_a_wrong_bit_is_refused(name: str, change: int, tmp_path: Path) -> None:
    """Row or column 5 of 8 is the start's, 0 is the adapter's."""
    peft = moved(ours({"init": "pissa"}))
    save_tensors(peft, None, tmp_path)

    def loss() -> float:
        with torch.no_grad():
            return float(packed_loss(peft))

    before, after = prove_adapter(peft, tmp_path, loss=loss)
    assert before == after
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensor = tensors[next(key for key in tensors if name in key)]
    tensor.select(0 if name == "lora_A" else 1, change).mul_(1 + 1e-6)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="must give back what was trained"):
        prove_adapter(peft, tmp_path, loss=loss)
    assert loss() == before and not holds_adapter(peft, tmp_path)


def test_a_run_that_starts_from_the_saved_adapter_begins_where_that_one_ended(tmp_path: Path) -> None:
    peft = moved(ours({"init": "pissa"}))
    save_tensors(peft, None, tmp_path)
    lora = {"r": 8, "alpha": 64.0, "start_from": str(tmp_path)}
    check_start(LoraSection(**lora))
    later = ours(lora)
    load_start(later, LoraSection(**lora), base="")
    assert float(packed_loss(later)) == pytest.approx(float(packed_loss(peft)), rel=1e-6)
    assert not start_parameters(later)
    with pytest.raises(RecipeError, match="lora.r is 4 here, 8 there; lora.alpha is 32.0 here, 64.0 there"):
        check_start(LoraSection(r=4, start_from=str(tmp_path)))
