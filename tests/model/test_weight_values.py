"""A loaded base is compared with its files: none is trained that was drawn at random, or is in the wrong place."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from launcher.errors import RecipeError
from launcher.model import load
from launcher.model.load import load_base, load_config
from launcher.model.weight_files import read_headers
from launcher.model.weight_values import compare_with_files
from launcher.recipe.schema import ModelSection, QuantSection
from tests.support.models import build

CPU = torch.device("cpu")
KINDS = ("full", "nf4", "nf4, single", "packed", "packed as bfloat16")


@pytest.fixture(scope="module", params=KINDS)
def loaded(request, small_model, tmp_path_factory):
    """The small model from a full checkpoint, and from one that is quantised, and the headers of its files."""
    folder = str(small_model)
    if request.param.startswith("packed"):
        folder = str(tmp_path_factory.mktemp("packed"))
        storage = "bfloat16" if "bfloat16" in request.param else "uint8"
        settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": storage}
        wanted = BitsAndBytesConfig(load_in_4bit=True, **settings)
        saved = AutoModelForCausalLM.from_pretrained(small_model, quantization_config=wanted, device_map={"": "cpu"})
        saved.save_pretrained(folder)
    quant = QuantSection(type="none" if request.param == "full" else "nf4", double="single" not in request.param)
    return from_folder(folder, quant=quant), read_headers(folder, None)


def from_folder(folder, *, quant):
    config = load_config(folder, ModelSection(name=folder))
    return load_base(folder, config, quant=quant, dtype=torch.bfloat16, device=CPU, revision=None)


def test_every_tensor_of_a_base_that_is_loaded_whole_is_counted(loaded):
    base, _ = loaded
    assert base.verdict.holds and base.verdict.evidence.startswith("21 of 21 tensors")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
        ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"),
        ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"),
        ("model.embed_tokens", "lm_head"),
    ],
)
def test_two_tensors_in_each_others_place_are_named(loaded, one, other):
    base, headers = loaded
    first, second = (base.model.get_submodule(name) for name in (one, other))
    first.weight, second.weight = second.weight, first.weight
    try:
        verdict = compare_with_files(base.model, headers)
    finally:
        first.weight, second.weight = second.weight, first.weight
    assert not verdict.holds and f"{one}.weight" in verdict.evidence and f"{other}.weight" in verdict.evidence
    assert verdict.evidence.startswith("19 of 21 tensors")
    assert compare_with_files(base.model, headers).holds


def test_a_cpu_with_bf16_instructions_evaluates_with_the_weights_and_dtype_that_it_trains_with(
    small_model, monkeypatch
):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)  # as bitsandbytes asks each linear
    model, ids = from_folder(str(small_model), quant=QuantSection()).model, torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("piece", [slice(0, 64), slice(-64, None)])
def test_a_tensor_that_differs_at_its_first_or_last_values_is_named(loaded, piece):
    base, headers = loaded
    name = "model.layers.1.mlp.down_proj.weight"
    values = base.model.get_parameter(name).data.flatten().view(torch.uint8)[piece]
    values.bitwise_not_()
    try:
        assert name in compare_with_files(base.model, headers).evidence
    finally:
        values.bitwise_not_()


def test_weights_with_outliers_are_within_the_quantisers_step(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "outliers")
    generator = torch.Generator().manual_seed(0)

    def cauchy(shape):  # its blocks' scales differ by orders of magnitude, so the second quantisation is coarse
        return torch.empty(shape).cauchy_(generator=generator)

    tensors = {name: cauchy(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert from_folder(str(folder), quant=QuantSection()).verdict.holds


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named_as_such(small_model, tmp_path, value, quant, name):
    folder = shutil.copytree(small_model, tmp_path / "not-finite")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=rf"1 tensors of its files hold NaN or infinity.*: {name}\.") as caught:
        from_folder(str(folder), quant=QuantSection(type=quant))
    assert caught.value.code == 2 and "misreads" not in str(caught.value)


@pytest.mark.parametrize("loaded", ["packed", "packed as bfloat16"], indirect=True)  # the others store no scales
def test_scales_of_packed_weights_that_are_not_finite_are_named_as_such(loaded):
    base, headers = loaded
    name = "model.layers.1.mlp.down_proj.weight.nested_absmax"
    file = headers[name].file
    tensors = load_file(file)
    sound = tensors[name].clone()
    try:
        save_file(tensors | {name: sound * float("nan")}, file, metadata={"format": "pt"})
        with pytest.raises(RecipeError, match=name):
            compare_with_files(base.model, headers)
    finally:
        save_file(tensors | {name: sound}, file, metadata={"format": "pt"})


def test_a_loader_that_fills_the_wrong_place_ends_the_run(small_model, monkeypatch):
    def mixed_up(*arguments, **options):
        model, info = AutoModelForCausalLM.from_pretrained(*arguments, **options)
        one, other = (layer.mlp for layer in model.model.layers)
        one.up_proj, other.up_proj = other.up_proj, one.up_proj
        return model, info

    monkeypatch.setattr(load, "AutoModelForCausalLM", type("Loader", (), {"from_pretrained": mixed_up}))
    with pytest.raises(RecipeError, match=r"19 of 21 tensors.*layers\.0\.mlp\.up_proj\.weight") as caught:
        from_folder(str(small_model), quant=QuantSection())
    assert caught.value.code == 2


def test_an_error_of_the_loader_is_a_message_and_out_of_memory_is_not(small_model, monkeypatch):
    def failing(error):
        def fail(*arguments, **options):
            raise error

        return type("Loader", (), {"from_pretrained": fail})

    monkeypatch.setattr(load, "AutoModelForCausalLM", failing(RuntimeError("mat1 and mat2")))
    with pytest.raises(RecipeError, match="RuntimeError: mat1 and mat2"):
        from_folder(str(small_model), quant=QuantSection())
    monkeypatch.setattr(load, "AutoModelForCausalLM", failing(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        from_folder(str(small_model), quant=QuantSection())


def test_an_adapter_in_the_models_folder_is_ignored_with_a_note(small_model, make_recipe, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "with-adapter")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(small_model), LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    )
    adapted.save_pretrained(folder)
    built, alone = build(make_recipe(model={"name": str(folder)})), build(make_recipe())
    assert [name for name, _ in built.peft.named_parameters()] == [name for name, _ in alone.peft.named_parameters()]
    assert built.trainable == alone.trainable
    assert built.loaded[0].holds
    assert "adapter_config.json" in built.notes[0] and not alone.notes
    assert built.peft.peft_config["default"].base_model_name_or_path == str(folder)


def test_a_hub_id_is_loaded_from_the_cache_as_a_folder_is(small_model, tmp_path, monkeypatch):
    repository, commit = tmp_path / "models--some--model", "a" * 40
    shutil.copytree(small_model, repository / "snapshots" / commit)
    (repository / "snapshots" / commit / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "another/base"}'
    )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = from_folder("some/model", quant=QuantSection())
    assert base.verdict.evidence.startswith("21 of 21 tensors")
    assert "ignored" in base.notes[0]


def test_a_hub_id_without_weights_in_reach_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert read_headers("some/model", None) is None  # not known yet
    with pytest.raises(RecipeError, match="some/model"):
        read_headers("some/model", None, download=True)
