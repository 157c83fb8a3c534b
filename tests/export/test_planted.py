"""An export that is not the trained model is refused: code 4, and the folder kept aside."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedTokenizerFast

from launcher.export import limits, merge, proof, write
from tests.export.conftest import Main

Updates = dict[str, merge.Update]
WEIGHTS = "every written weight is the trained model's"
LOSS, KL = "the loss is the trained model's", "next tokens have the trained model's probabilities"
K = "model.layers.{}.self_attn.k_proj.weight"


def scaled(updates: Updates) -> Updates:
    return {name: update._replace(scale=update.scale * 1.1) for name, update in updates.items()}


def transposed(updates: Updates) -> Updates:
    """Of a square B, which fits either way."""
    update = updates[K.format(0)]
    assert update.b.shape[0] == update.b.shape[1]
    return updates | {K.format(0): update._replace(b=update.b.T)}


def swapped(updates: Updates) -> Updates:
    first, second = K.format(0), K.format(1)
    return updates | {first: updates[second], second: updates[first]}


def swapped_b(updates: Updates) -> Updates:
    first, second = updates[K.format(0)], updates[K.format(1)]
    return updates | {K.format(0): first._replace(b=second.b), K.format(1): second._replace(b=first.b)}


def dropped(updates: Updates) -> Updates:
    return {name: update for name, update in updates.items() if name != K.format(1)}


def refused(done: Any, folder: Path, claims: set[str]) -> None:
    """Assert code 4, a folder kept aside, and that these claims broke."""
    assert done.code == 4, done.err
    assert "an exported model must be the trained one" in done.err and "out.unproven" in done.out
    assert len(done.err[done.err.index("error: ") :].strip().splitlines()) <= 5
    assert {path.name for path in folder.iterdir()} == {"out.unproven", "report.json"}
    assert claims <= done.broken, done.broken


@pytest.mark.parametrize(
    "options", [("on=dequantised",), ("on=original",), ("format=gguf",), ("format=gguf", "quantization=q8_0")]
)
@pytest.mark.parametrize("plant", [scaled, transposed, swapped, swapped_b, dropped])
def test_an_update_that_is_not_the_trained_one(
    export: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[Updates], Updates],
    options: tuple[str, ...],
) -> None:
    monkeypatch.setattr(write, "read_updates", lambda adapter: plant(merge.read_updates(adapter)))
    refused(export(*options), tmp_path, {WEIGHTS})


def test_a_wrong_scale_shows_in_the_loss_too(export: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "read_updates", lambda adapter: scaled(merge.read_updates(adapter)))
    monkeypatch.setattr(write, "weights_verdict", lambda *_: write.Verdict("not looked at", True, ""))
    refused(export(), tmp_path, {LOSS})


@pytest.mark.parametrize(
    ("tokens", "shift", "holds"), [(44, 0.0066, True), (44, 0.03, False), (4000, 0.005, True), (4000, 0.0075, False)]
)
def test_the_losses_of_few_tokens_may_scatter_and_those_of_many_may_not(tokens: int, shift: float, holds: bool) -> None:
    """Differences of a token by 0.03 nats, as rounding to 16 bits makes them, and one that all tokens share."""
    torch.manual_seed(0)
    noise = torch.randn(tokens) * 0.03
    probe = Mock(documents=[], tokens=tokens)
    outputs = [
        proof.ModelOutputs(
            losses, torch.zeros(tokens), torch.randn(2, 5, generator=torch.Generator().manual_seed(0)), []
        )
        for losses in (torch.full((tokens,), 5.0), 5.0 + shift + noise - noise.mean())
    ]
    verdicts = proof.figure_verdicts(proof.figures_of(*outputs, probe), limits.HALF_WIDTH)
    assert {verdict.claim: verdict.holds for verdict in verdicts}[LOSS] == holds


@pytest.mark.parametrize("on", ["dequantised", "original"])
def test_a_base_without_the_adapter_is_beyond_every_limit(
    export: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: str
) -> None:
    monkeypatch.setattr(write, "read_updates", lambda adapter: {})
    refused(export(f"on={on}"), tmp_path, {WEIGHTS, LOSS, KL, "the likeliest next tokens are the trained model's"})


def altered(change: Callable[[Path], object]) -> Callable[..., Any]:
    """write_merged, after which `change` has its way with the folder."""

    def write_and_change(plan: Any, updates: Any, folder: Path, **options: Any) -> None:
        merge.write_merged(plan, updates, folder, **options)
        change(folder)

    return write_and_change


def other_shard(folder: Path) -> None:
    """One file of several is of another base: same names, same shapes."""
    file = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(file)
    save_file({name: torch.randn_like(t) * t.float().std() for name, t in tensors.items()}, file, {"format": "pt"})


def renamed_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = {name.replace("1.mlp.up", "1.mlp.upper"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "claims"), [(other_shard, {WEIGHTS, LOSS, KL}), (renamed_weight, {WEIGHTS, "the folder loads whole"})]
)
def test_files_that_hold_something_else(
    export: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], claims: set[str]
) -> None:
    monkeypatch.setattr(write, "write_merged", altered(change))
    refused(export(*(["shard_mib=1"] if change is other_shard else [])), tmp_path, claims)


@pytest.mark.parametrize("format", ["merged", "adapter"])
def test_another_chat_template(export: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    save = PreTrainedTokenizerFast.save_pretrained

    def save_with_another(self: Any, folder: str, **options: Any) -> Any:
        saved, template = save(self, folder, **options), Path(folder, "chat_template.jinja")
        template.write_text(template.read_text().replace("<|assistant|>", "<|user|>"))
        return saved

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save_with_another)
    refused(export(f"format={format}"), tmp_path, {"chats are rendered as in training"})


@pytest.mark.parametrize("format", ["merged", "adapter"])
def test_another_stop_token(export: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    to_file = GenerationConfig.to_json_file

    def to_file_with_another(self: GenerationConfig, path: Path) -> None:
        self.eos_token_id = 7
        to_file(self, path)

    monkeypatch.setattr(GenerationConfig, "to_json_file", to_file_with_another)
    refused(export(f"format={format}"), tmp_path, {"answers end at the trained model's stop tokens"})


def test_an_interrupted_export_leaves_nothing(export: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "weights_verdict", interrupted)
    done = export()
    assert done.code == 130 and "interrupted; nothing of it is left" in done.err
    assert list(tmp_path.iterdir()) == []


def rescaled_adapter(folder: Path) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * 1.1}))


def rewritten(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def change_file(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})

    return change_file


def with_a_transposed_b(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"
    return tensors | {name: tensors[name].T.contiguous()}


def without_a_module(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.k_proj" not in name}


def a_value_further(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By so little that no loss tells."""
    name, tensor = next(iter(tensors.items()))
    tensor[0, 0] = torch.nextafter(tensor[0, 0], torch.tensor(9.0))
    return tensors | {name: tensor}


@pytest.mark.parametrize(
    ("change", "claims"),
    [
        (rescaled_adapter, {WEIGHTS, LOSS}),
        (rewritten(with_a_transposed_b), {WEIGHTS, LOSS}),
        (rewritten(without_a_module), {WEIGHTS, LOSS}),
        (rewritten(a_value_further), {WEIGHTS}),
    ],
)
def test_an_adapter_that_was_changed_on_the_way(
    export: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], claims: set[str]
) -> None:
    copy = write.shutil.copytree

    def copy_and_change(source: Path, target: Path, **options: Any) -> None:
        copy(source, target, **options)
        change(target)

    monkeypatch.setattr(write.shutil, "copytree", copy_and_change)
    refused(export("format=adapter"), tmp_path, claims)
