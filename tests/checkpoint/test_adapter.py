import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from launcher.checkpoint.adapter import adapter_digest, prove_adapter, save_adapter, save_proven, trained_parameters
from launcher.checkpoint.folder import RunFolder
from launcher.errors import CheckpointError


class Tokenizer:
    def save_pretrained(self, folder):
        pass


@pytest.fixture
def trained(small_model, tmp_path):
    """A model whose adapter has been moved, its saved folder, and a function that gives its loss."""
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(small_model), settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.arange(20)[None] + 5

    def loss():
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    save_adapter(model, Tokenizer(), tmp_path / "saved")
    return model, tmp_path / "saved", loss


def test_a_good_adapter_restores_its_loss_and_its_weights_and_gets_its_name(trained, tmp_path):
    model, _, loss = trained
    digest, folder = adapter_digest(model), RunFolder(tmp_path)
    verdict = save_proven(model, Tokenizer(), folder, loss=loss)
    assert verdict.holds and verdict.evidence == f"loss {loss():.6f} trained, {loss():.6f} reloaded from disk"
    assert adapter_digest(model) == digest
    assert (folder.adapter / "adapter_model.safetensors").exists() and not folder.adapter_staging.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: dict(list(tensors.items())[1:]),
        lambda tensors: {name: tensor * 0 for name, tensor in tensors.items()},
        lambda tensors: {name.replace("layers.0", "layers.0._orig_mod"): tensor for name, tensor in tensors.items()},
    ],
    ids=["a tensor is missing", "all zeros", "names of a compile wrapper"],
)
def test_a_damaged_adapter_is_refused_and_the_trained_weights_stay(trained, damage):
    model, folder, loss = trained
    digest, file = adapter_digest(model), folder / "adapter_model.safetensors"
    save_file(damage(load_file(file)), file)
    with pytest.raises(CheckpointError) as caught:
        prove_adapter(model, folder, loss=loss)
    assert caught.value.code == 4
    assert adapter_digest(model) == digest


@pytest.mark.parametrize("change", [{"lora_alpha": 1}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}])
def test_an_adapter_config_with_another_setting_is_refused(trained, change):
    model, folder, loss = trained
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=next(iter(change))):
        prove_adapter(model, folder, loss=loss)


def test_a_digest_changes_with_any_bit_of_a_trained_weight_and_with_no_other():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    digest = adapter_digest(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert adapter_digest(model) == digest
    with torch.no_grad():
        model[1].bias[2] = torch.nextafter(model[1].bias[2], torch.tensor(9.0))
    assert adapter_digest(model) != digest
