import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.checkpoint.adapter import prove_adapter, save_adapter
from launcher.errors import CheckpointError
from tests.support.models import build


class Tokenizer:
    def save_pretrained(self, folder):
        pass


@pytest.fixture
def trained(make_recipe, tmp_path):
    """A model whose adapter has been moved, its saved folder, and a function that gives its loss."""
    built = build(make_recipe())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in built.peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.arange(20)[None] + 5
    documents, boundaries = torch.zeros(1, 20, dtype=torch.int32), torch.tensor([0, 20], dtype=torch.int32)

    def loss():
        with torch.no_grad():
            return float(built.packed(ids, ids.roll(-1, 1), torch.arange(20)[None], documents, boundaries)) / 20

    folder = tmp_path / "adapter"
    save_adapter(built.peft, Tokenizer(), folder)
    return built.peft, folder, loss


def test_a_good_adapter_gives_back_its_loss_and_its_weights(trained):
    model, folder, loss = trained
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    before, after = prove_adapter(model, folder, loss=loss)
    assert before == after
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)


def rewrite(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: dict(list(tensors.items())[1:]),
        lambda tensors: {name: tensor * 0 for name, tensor in tensors.items()},
        lambda tensors: {name.replace("layers.0", "layers.0._orig_mod"): tensor for name, tensor in tensors.items()},
    ],
    ids=["a tensor is missing", "all zeros", "names of a compile wrapper"],
)
def test_a_damaged_adapter_is_refused_and_the_trained_weights_stay(trained, change):
    model, folder, loss = trained
    before = loss()
    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        prove_adapter(model, folder, loss=loss)
    assert caught.value.code == 4
    assert loss() == before


def test_an_adapter_config_that_says_something_else_is_refused(trained):
    model, folder, loss = trained
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    with pytest.raises(CheckpointError, match="lora_alpha"):
        prove_adapter(model, folder, loss=loss)


def test_the_base_is_named_by_an_absolute_path(trained, small_model):
    _, folder, _ = trained
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(small_model)
