"""Every checkpoint whose files are not the model's is refused by their headers, before any weight is read."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from launcher.errors import RecipeError
from launcher.model.build import check_model
from launcher.model.load import empty_model, load_config
from launcher.model.weight_files import check_headers, read_headers
from launcher.recipe.locate import locate
from launcher.recipe.schema import ModelSection
from tests.support.models import ARCHITECTURES

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def checkpoint(small_model, tmp_path):
    """A copy of the small model, and functions that change its weights and its config."""
    return Checkpoint(shutil.copytree(small_model, tmp_path / "checkpoint"))


class Checkpoint:
    def __init__(self, folder):
        self.folder, self.file = folder, folder / "model.safetensors"

    def change(self, change):
        save_file(change(load_file(self.file)), self.file, metadata={"format": "pt"})

    def configure(self, **values):
        config = json.loads((self.folder / "config.json").read_text())
        (self.folder / "config.json").write_text(json.dumps(config | values))

    def shard(self):
        """Two files and an index; returns the files."""
        AutoModelForCausalLM.from_pretrained(self.folder).save_pretrained(self.folder / "new", max_shard_size="3MB")
        self.file.unlink()
        for path in (self.folder / "new").iterdir():
            path.replace(self.folder / path.name)
        return sorted(self.folder.glob("model-*.safetensors"))


@pytest.fixture
def refusal(make_recipe):
    """The message with which a checkpoint is refused before any weight is read."""

    def refuse(checkpoint, **sections):
        recipe = make_recipe(model={"name": str(checkpoint.folder)}, **sections)
        with pytest.raises(RecipeError) as caught:
            source = locate(recipe.model, ARCHITECTURES)
            check_model(recipe, source, load_config(source, recipe.model), CPU)
        message = str(caught.value)
        assert caught.value.code == 2 and len(message.splitlines()) <= 5
        return message

    return refuse


def test_a_whole_checkpoint_is_not_refused(make_recipe, small_model):
    recipe = make_recipe()
    check_model(recipe, str(small_model), load_config(str(small_model), recipe.model), CPU)


def renamed(change):
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def converted(name, change):
    return lambda tensors: tensors | {name: change(tensors[name])}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (renamed("_orig_mod.{}".format), ("21 of 21 are missing", "torch.compile's wrapper")),
        (renamed("module.{}".format), ("module.lm_head.weight", "DistributedDataParallel's wrapper")),
        (renamed(lambda n: n.replace("layers.1.", "layers.1._orig_mod.")), ("9 of 21", "torch.compile's wrapper")),
        (renamed("base_model.model.{}".format), ("21 are not the model's", "merge the adapter")),
        (renamed(lambda n: n.removeprefix("model.")), ("model.embed_tokens.weight", "with its head")),
        (renamed(lambda n: n.replace("q_proj.weight", "q_proj.qweight")), ("2 of 21", "GPTQ and AWQ")),
        (renamed(lambda n: n.replace("model.layers", "transformer.h")), ("18 of 21", "came with these weights")),
        (without(DOWN), ("1 of 21 are missing", DOWN, "Complete the checkpoint")),
        (without("model.norm.weight"), ("model.norm.weight", "Complete")),
        (without("model.embed_tokens.weight"), ("model.embed_tokens.weight", "Complete")),
        (without("lm_head.weight"), ("lm_head.weight", "Complete")),
        (lambda tensors: tensors | {"extra.bias": torch.ones(2)}, ("1 are not the model's: extra.bias",)),
        (converted(DOWN, lambda t: t.T.contiguous()), ("1 have another shape", "128 x 64", "64 x 128")),
        (converted(DOWN, lambda t: t.to(torch.float8_e4m3fn)), ("F8_E4M3", DOWN, "unquantised")),
        (converted(DOWN, lambda t: t.to(torch.int8)), ("1 are I8", DOWN)),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_models_are_named_with_a_remedy(checkpoint, refusal, change, expected):
    checkpoint.change(change)
    message = refusal(checkpoint)
    assert all(text in message for text in expected), message


def test_many_names_are_counted_and_the_first_are_listed(checkpoint, refusal):
    checkpoint.change(lambda tensors: {"lm_head.weight": tensors["lm_head.weight"]})
    message = refusal(checkpoint)
    assert "20 of 21 are missing" in message and "and 17 more" in message and len(message) < 400


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_hidden_layers": 3}, ("num_hidden_layers is 3", "layers 0 to 1")),
        ({"num_hidden_layers": 1}, ("num_hidden_layers is 1", "layers 0 to 1")),
        ({"num_hidden_layers": 1_000_000}, ("num_hidden_layers is 1000000",)),
        ({"vocab_size": 5000}, ("2 have another shape", "lm_head.weight", "8192 x 64", "5000 x 64")),
        ({"intermediate_size": 256}, ("6 have another shape", "64 x 128", "64 x 256")),
        ({"hidden_size": 32}, ("have another shape", "32")),
        ({"attention_bias": True}, ("8 of 29 are missing", "q_proj.bias")),
        ({"num_attention_heads": 0}, ("ZeroDivisionError",)),
        ({"rms_norm_eps": "small"}, ("rms_norm_eps",)),
        ({"hidden_act": "bogus"}, ("transformers can build", "bogus")),
        ({"dtype": "nonsense"}, ("nonsense",)),
        ({"quantization_config": 4}, ("config.json that transformers knows",)),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("already quantised as 'gptq'",)),
        ({"quantization_config": {"quant_method": "fp8"}}, ("already quantised as 'fp8'",)),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, ("bitsandbytes 8-bit",)),
    ],
)
def test_a_config_that_is_not_of_these_weights_is_refused(checkpoint, refusal, values, expected):
    checkpoint.configure(**values)
    message = refusal(checkpoint)
    assert all(text in message for text in expected), message


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '"x"', "{}", "\x00"])
def test_a_config_that_is_none_is_refused(checkpoint, refusal, text):
    (checkpoint.folder / "config.json").write_text(text)
    assert str(checkpoint.folder) in refusal(checkpoint)


@pytest.mark.parametrize("content", [b"", b"{}", b"version https://git-lfs.github.com/spec/v1\n" * 3, b"\xff" * 64])
def test_a_file_that_is_no_safetensors_file_is_refused(checkpoint, refusal, content):
    checkpoint.file.write_bytes(content)
    assert "weights must be whole" in refusal(checkpoint)


@pytest.mark.parametrize("size", [100, 10_000, -1])
def test_a_truncated_file_is_refused(checkpoint, refusal, size):
    checkpoint.file.write_bytes(checkpoint.file.read_bytes()[:size])
    assert "model.safetensors is not" in refusal(checkpoint)


def test_a_shard_that_is_missing_is_named(checkpoint, refusal):
    *_, last = checkpoint.shard()
    last.unlink()
    message = refusal(checkpoint)
    assert last.name in message and "are missing" in message


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {}}', '{"metadata": {}, "weight_map": 5}'])
def test_an_index_that_cannot_be_read_is_refused(checkpoint, refusal, index):
    checkpoint.shard()
    (checkpoint.folder / INDEX).write_text(index)
    assert INDEX in refusal(checkpoint)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("pytorch_model.bin", "Convert"),
        ("adapter_model.safetensors", "name its base"),
        ("other.safetensors", "Complete the checkpoint"),
        ("model.gguf", "name the checkpoint that they were made from"),
    ],
)
def test_a_folder_without_weights_is_told_what_its_files_are(checkpoint, refusal, name, remedy):
    checkpoint.file.rename(checkpoint.folder / name)
    message = refusal(checkpoint)
    assert name in message and remedy in message


def test_an_adapters_folder_is_told_apart(checkpoint, refusal):
    (checkpoint.folder / "config.json").rename(checkpoint.folder / "adapter_config.json")
    assert "LoRA adapter's: name its base" in refusal(checkpoint)


def test_stored_frequencies_of_the_rotary_table_are_allowed(checkpoint):
    checkpoint.change(lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    check(checkpoint)


@pytest.mark.parametrize("left_out", ["lm_head.weight", "model.embed_tokens.weight", "neither"])
def test_a_tied_head_may_be_stored_as_a_copy_or_alone(checkpoint, left_out):
    checkpoint.configure(tie_word_embeddings=True)
    checkpoint.change(without(left_out))
    check(checkpoint)


def test_a_tied_head_is_missing_where_the_embedding_is_too(checkpoint):
    checkpoint.configure(tie_word_embeddings=True)
    checkpoint.change(without("lm_head.weight", "model.embed_tokens.weight"))
    with pytest.raises(RecipeError, match=r"model\.embed_tokens\.weight"):
        check(checkpoint)


def check(checkpoint):
    headers = read_headers(str(checkpoint.folder), None)
    check_headers(
        headers, empty_model(load_config(str(checkpoint.folder), ModelSection(name="any"))), prequantised=False
    )


# --- checkpoints that are already quantised


@pytest.fixture
def quantised(small_model, tmp_path):
    """A function that saves the small model in NF4, with these modules left as they are."""

    def save(*skipped, **settings):
        wanted = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[*skipped],
            **{"bnb_4bit_use_double_quant": True, **settings},
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            small_model, quantization_config=wanted, device_map={"": "cpu"}, dtype=torch.bfloat16
        )
        model.save_pretrained(tmp_path / "quantised")
        return Checkpoint(tmp_path / "quantised")

    return save


@pytest.mark.parametrize(
    ("skipped", "expected"),
    [
        ((), ("1 are quantised too: lm_head.weight",)),
        (("lm_head", "model.layers.1.mlp.down_proj"), ("1 are not quantised", DOWN, "several kinds")),
        (("lm_head", "q_proj"), ("2 are not quantised", "q_proj.weight")),
    ],
)
def test_a_checkpoint_that_is_quantised_in_part_is_refused_by_name(quantised, refusal, skipped, expected):
    message = refusal(quantised(*skipped))
    assert all(text in message for text in expected), message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without(f"{DOWN}.absmax"), ("1 are quantised otherwise", DOWN)),
        (without(f"{DOWN}.nested_absmax"), ("1 are quantised otherwise", DOWN)),
        (renamed(lambda n: n.replace("nf4", "fp4")), ("14 are quantised otherwise", "unquantised")),
        (converted(DOWN, lambda t: t[:-1].clone()), ("1 have another shape", DOWN)),
        (converted(f"{DOWN}.absmax", lambda t: t[:5].clone()), ("1 of these tensors", f"{DOWN}.absmax", "5", "128")),
        (converted(f"{DOWN}.nested_absmax", lambda t: t.repeat(2)), (f"{DOWN}.nested_absmax", "is 2", "weight 1)")),
        (converted(f"{DOWN}.quant_map", lambda t: t[:15].clone()), (f"{DOWN}.quant_map", "is 15", "weight 16)")),
        (converted(f"{DOWN}.nested_quant_map", lambda t: t[:9].clone()), (f"{DOWN}.nested_quant_map", "is 9", "256)")),
    ],
)
def test_packed_weights_that_are_not_whole_are_named(quantised, refusal, change, expected):
    checkpoint = quantised("lm_head")
    checkpoint.change(change)
    message = refusal(checkpoint)
    assert all(text in message for text in expected), message


def test_weights_and_config_must_agree_on_being_quantised(quantised, checkpoint, refusal):
    packed = quantised("lm_head")
    settings = json.loads((packed.folder / "config.json").read_text())["quantization_config"]
    checkpoint.configure(quantization_config=settings)
    assert "14 are not quantised" in refusal(checkpoint)
    packed.configure(quantization_config=None)
    assert "no quantization_config" in refusal(packed)
