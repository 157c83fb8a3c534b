"""lora.start_from: training goes on from an adapter that exists; another one is refused, naming both."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from launcher.checkpoint.plain_lora import TOKEN_ROWS
from launcher.checkpoint.start_adapter import check_start
from launcher.errors import CheckpointError, RecipeError
from launcher.preflight.before_torch import goes_on
from launcher.records.run import RunRecord, StartRecord
from tests.support.runs import adapter, events_of, record_of, trained

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def first(make: Any, tmp_path: Path) -> tuple[Path, RunRecord]:
    """The adapter of a finished run, and the run's record."""
    events = trained(make("first", train={"lr": 1e-2, "save_every": 0}))
    return tmp_path / "first" / "adapter", next(event for event in events if isinstance(event, RunRecord))


def started(recipe: Any) -> tuple[StartRecord, RunRecord]:
    events = events_of(recipe)
    return (
        next(event for event in events if isinstance(event, StartRecord)),
        next(event for event in events if isinstance(event, RunRecord)),
    )


def test_a_run_begins_where_the_adapter_ended_and_says_from_which(make: Any, first: Any) -> None:
    folder, before = first
    start, record = started(make("second", lora={"start_from": str(folder)}))
    assert record.evals[0].eval_loss == pytest.approx(before.evals[-1].eval_loss, rel=1e-6)
    assert before.evals[-1].eval_loss < before.evals[0].eval_loss - 0.01
    notes = [note for note in start.notes if str(folder) in note]
    assert len(notes) == 1 and "sha256" in notes[0] and "not fitted" not in notes[0]


def test_a_resumed_run_has_the_weights_of_its_checkpoint(make: Any, first: Any, tmp_path: Path) -> None:
    lora = {"start_from": str(first[0])}
    trained(make("whole", lora=lora))
    assert not goes_on(make("cut", lora=lora), "test")
    trained(make("cut", lora=lora), until=6)
    shutil.rmtree(first[0])
    assert goes_on(make("cut", lora=lora), "test")
    trained(make("cut", lora=lora))
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")


def test_another_base_is_said(make: Any, first: Any) -> None:
    folder, _ = first
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "a/b"}))
    start, _ = started(make("second", lora={"start_from": str(folder)}, train={"steps": 1}))
    assert any("trained on a/b; this run's base is" in note for note in start.notes)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 8}, "lora.r is 8 here, 4 there.*Set lora.r=4"),
        ({"alpha": 5.0, "rslora": True}, "lora.alpha is 5.0 here, 32.0 there; lora.rslora is True here, False there"),
        ({"targets": ["q_proj"]}, "lora.targets is .'q_proj'. here"),
        ({"dora": True}, "lora.dora"),
    ],
)
def test_settings_that_differ_are_refused_naming_both(make: Any, first: Any, lora: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        check_start(make(lora={"start_from": str(first[0]), **lora}).lora)


def with_settings(folder: Path, **settings: Any) -> None:
    """Change the settings of the adapter in `folder`."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the settings of an adapter, as PEFT saves them for a default recipe, and a file for its weights."""
    settings = LoraConfig(r=4, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    settings.save_pretrained(str(tmp_path / "saved"))
    (tmp_path / "saved" / "adapter_model.safetensors").touch()
    return tmp_path / "saved"


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga", "mica"])
def test_an_adapter_that_may_belong_to_a_changed_base_is_refused(make: Any, saved: Path, init: str) -> None:
    with_settings(saved, init_lora_weights=init)
    with pytest.raises(RecipeError, match=f'init_lora_weights="{init}".*\n.*path_initial_model'):
        check_start(make(lora={"start_from": str(saved)}).lora)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("alora_invocation_tokens", [1, 2]),
        ("target_parameters", ["experts.weight"]),
        ("layer_replication", [[0, 2]]),
        ("use_qalora", True),
        ("use_bdlora", {}),
        ("of_a_later_peft", 0.5),
    ],
)
def test_an_adapter_that_is_more_than_plain_lora_is_refused_by_what_it_has(
    make: Any, saved: Path, name: str, value: Any
) -> None:
    with_settings(saved, **{name: value})
    with pytest.raises(RecipeError, match=rf"must be plain LoRA; .* has {name}=") as refused:
        check_start(make(lora={"start_from": str(saved)}).lora)
    assert json.dumps(value) in str(refused.value)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_a_plain_adapter_of_each_start_that_leaves_the_base_is_taken(make: Any, saved: Path, init: Any) -> None:
    with_settings(saved, init_lora_weights=init, auto_mapping={"of": "another trainer"}, lora_dropout=0.1)
    assert check_start(make(lora={"start_from": str(saved)}).lora) == str(saved)


@pytest.mark.parametrize("numbers", [[1, 0], 0])
def test_the_adapted_layers_must_be_those_of_the_recipe(make: Any, saved: Path, numbers: Any) -> None:
    with_settings(saved, layers_to_transform=numbers)
    listed = sorted(numbers) if isinstance(numbers, list) else [numbers]
    for layers in ([], ["1-2"]):
        with pytest.raises(RecipeError, match=r"lora\.layers is \[.*here") as refused:
            check_start(make(lora={"start_from": str(saved), "layers": layers}).lora)
        assert f"lora.layers={json.dumps(listed)}" in str(refused.value)
    assert check_start(make(lora={"start_from": str(saved), "layers": listed}).lora)


def test_a_saved_fused_projection_is_what_all_of_its_parts_name(make: Any, saved: Path) -> None:
    fused = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    with_settings(saved, target_modules=fused)
    for targets in (TARGETS, fused):
        assert check_start(make(lora={"start_from": str(saved), "targets": targets}).lora)
    with pytest.raises(RecipeError, match=r"lora\.targets is .*'q_proj'.* here, .*'qkv_proj'.* there"):
        check_start(make(lora={"start_from": str(saved), "targets": [*TARGETS[:2], *TARGETS[3:]]}).lora)


@pytest.mark.parametrize(("tokens", "there"), [(["<|user|>", "17"], [4]), ([], [4]), (["4"], None)])
def test_another_number_of_trained_tokens_is_refused_naming_those_there(
    make: Any, saved: Path, tokens: list[str], there: list[int] | None
) -> None:
    with_settings(saved, trainable_token_indices=there)
    with pytest.raises(RecipeError, match=r"lora\.trainable_tokens is ") as refused:
        check_start(make(lora={"start_from": str(saved), "trainable_tokens": tokens}).lora)
    assert f"lora.trainable_tokens={there or []}" in str(refused.value)


def test_trained_tokens_go_on_in_whatever_order_they_were_saved_and_others_are_refused(
    make: Any, tmp_path: Path
) -> None:
    lora = {"trainable_tokens": ["<|end|>", "<|user|>"]}
    before = record_of(make("first", lora=lora, train={"lr": 1e-2, "save_every": 0}))
    folder = tmp_path / "first" / "adapter"
    settings = json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"]
    with_settings(folder, trainable_token_indices={name: ids[::-1] for name, ids in settings.items()})
    file = folder / "adapter_model.safetensors"
    tensors = {name: t.flip(0) if name.endswith(TOKEN_ROWS) else t for name, t in load_file(file).items()}
    save_file(tensors, file)
    record = record_of(make("second", lora={**lora, "start_from": str(folder)}))
    assert record.evals[0].eval_loss == pytest.approx(before.evals[-1].eval_loss, rel=1e-6)
    with pytest.raises(RecipeError, match=r"the tokens of lora.start_from.*\n.*Name those ids"):
        record_of(make("third", lora={"trainable_tokens": ["<|end|>", "17"], "start_from": str(folder)}))
    save_file({name: t[:1].clone() if name.endswith(TOKEN_ROWS) else t for name, t in tensors.items()}, file)
    with pytest.raises(RecipeError, match=r"differs in .*trainable_tokens_delta: \(1, "):
        record_of(make("fourth", lora={**lora, "start_from": str(folder)}))


def test_tensors_of_other_layers_are_refused_by_name(make: Any, first: Any) -> None:
    folder, _ = first
    file = folder / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.5"): t for name, t in load_file(file).items()}, file)
    with pytest.raises(RecipeError, match=r"layers\.1.*: none there|layers\.5.*none here"):
        record_of(make("second", lora={"start_from": str(folder)}))


def test_a_file_of_weights_that_is_cut_off_is_named(make: Any, first: Any) -> None:
    folder, _ = first
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is damaged: .*\nRestore it .*step-N/adapter"):
        record_of(make("second", lora={"start_from": str(folder)}))


def test_a_pickle_a_stray_path_and_a_hub_id_offline_are_refused(make: Any, first: Any) -> None:
    folder, _ = first
    with pytest.raises(RecipeError, match="neither"):
        check_start(make(lora={"start_from": "./no/such/folder"}).lora)
    with pytest.raises(RecipeError, match="a/b has no adapter_config.json that can be read"):
        record_of(make("second", lora={"start_from": "a/b"}))
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(RecipeError, match="bin file is not read"):
        check_start(make(lora={"start_from": str(folder)}).lora)
    shutil.rmtree(folder)
    with pytest.raises(RecipeError, match="neither"):
        check_start(make(lora={"start_from": str(folder)}).lora)
