"""Control tokens that a base model was never trained on are named; trained ones never are."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.errors import RecipeError
from launcher.model.load import load_config
from launcher.model.token_vectors import stored_vectors, untrained_notes
from launcher.model.weight_files import EMBEDDING, HEAD
from launcher.recipe.schema import ModelSection
from tests.conftest import TINY, small_config

BEGIN, END, SYSTEM, USER, ASSISTANT = range(1, 6)  # the shipped tokenizer's; <|system|> never occurred in training
USED = {"read": {BEGIN, END, USER, ASSISTANT, 100}, "written": {END, 100}}
NAMED = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "base")


@pytest.fixture(scope="module")
def trained():
    vectors = stored_vectors(str(TINY / "base"), small_config(tie_word_embeddings=True), ModelSection())
    assert vectors is not None
    return vectors[0]


def zero(vectors, ids):
    vectors[ids] = 0


def almost_zero(vectors, ids):
    vectors[ids] = 1e-23 * torch.randn(len(ids), vectors.shape[1]).to(vectors)


def mean(vectors, ids):
    vectors[ids] = vectors.float().mean(dim=0).to(vectors)


def like_unused(vectors, ids):
    """As in Llama 3.1's head: not the same bits."""
    system = vectors[SYSTEM].float()
    vectors[ids] = (system + 0.003 * system.norm() * torch.randn(len(ids), len(system)) / len(system) ** 0.5).to(
        vectors
    )


UNTRAINED = [zero, almost_zero, mean, like_unused]


@pytest.mark.parametrize("damage", UNTRAINED)
def test_an_end_token_that_was_never_trained_is_named(tokenizer, trained, damage):
    head = trained.clone()
    damage(head, [END])
    [note] = untrained_notes(trained, head, tokenizer, **USED)
    assert [token for token in NAMED if token in note] == ["<|end|>"]
    assert "output head" in note and "instruct model" in note


@pytest.mark.parametrize("damage", UNTRAINED)
def test_marks_that_the_model_cannot_tell_apart_are_named(tokenizer, trained, damage):
    embedding = trained.clone()
    damage(embedding, [USER, ASSISTANT])
    [note] = untrained_notes(embedding, trained, tokenizer, **USED)
    assert [token for token in NAMED if token in note] == ["<|user|>", "<|assistant|>"]
    assert "embedding" in note


def test_another_end_token_is_proposed_where_it_is_trained(tokenizer, trained):
    used = {"read": {USER, SYSTEM}, "written": {SYSTEM}}
    [note] = untrained_notes(trained, trained, tokenizer, **used)
    assert "such as <|end|>" in note
    head = trained.clone()
    zero(head, [END])
    [note] = untrained_notes(trained, head, tokenizer, **used)
    assert "such as" not in note


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_trained_or_only_read_is_not_named(tokenizer, trained, tied):
    head = trained if tied else trained.clone()
    if not tied:  # in an instruct model these are read only
        zero(head, [USER, ASSISTANT, BEGIN])
    assert untrained_notes(trained, head, tokenizer, **USED) == ()
    assert untrained_notes(trained, head, tokenizer, read=set(), written=set()) == ()
    assert untrained_notes(trained, head, tokenizer, read={100}, written={100}) == ()


def test_a_vector_that_a_resize_added_is_named_from_the_files(tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY / "base"), AutoTokenizer.from_pretrained(TINY / "base")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path, max_shard_size="5MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    vectors = stored_vectors(str(tmp_path), model.config, ModelSection())
    assert vectors is not None
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    [note] = untrained_notes(*vectors, tokenizer, read={USER, end}, written={end})
    assert "<|im_end|> (the mean of all tokens)" in note


@pytest.mark.parametrize("stored", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)])
def test_a_tied_head_is_the_one_that_the_files_hold(tmp_path, stored):
    tensors = {name: torch.full((8192, 64), float(name == HEAD)) for name in stored}
    AutoModelForCausalLM.from_config(small_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | tensors if EMBEDDING in stored else tensors, file, metadata={"format": "pt"})
    config = load_config(str(tmp_path), ModelSection())
    vectors = stored_vectors(str(tmp_path), config, ModelSection())
    assert vectors is not None
    assert [float(each[0, 0]) for each in vectors] == [float(stored[0] == HEAD), float(HEAD in stored)]
    if EMBEDDING in stored:  # as transformers loads it
        head = AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight
        assert torch.equal(head, vectors[1])


def test_how_many_vectors_are_like_one_is_said_as_what_was_counted(tokenizer, trained):
    head = trained.clone()
    like_unused(head, [END])
    [note] = untrained_notes(trained, head, tokenizer, **USED)
    assert "<|end|> (nearly equal to at least " in note


@pytest.mark.parametrize("lack", ["weights", "whole", "head", "trained"])
def test_weights_that_are_not_at_hand_are_not_looked_at(tmp_path, lack):
    config, model = (
        small_config(tie_word_embeddings=False),
        ModelSection(init="random" if lack == "trained" else "pretrained"),
    )
    tensors = {"model.embed_tokens.weight": torch.ones(4, 2), "lm_head.weight": torch.ones(4, 2)}
    if lack == "head":
        del tensors["lm_head.weight"]
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    if lack == "whole":
        file.write_bytes(file.read_bytes()[:-8])
    if lack == "weights":
        file.unlink()
    assert stored_vectors(str(tmp_path), config, model) is None


@pytest.mark.parametrize(
    ("pad_id", "refused"), [(None, False), (8191, False), (-1, False), (8192, True), (-8193, True)]
)
def test_a_pad_id_of_the_config_without_a_vector_is_refused(tmp_path, pad_id, refused):
    small_config(pad_token_id=pad_id).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="pad_token_id") if refused else nullcontext():
        AutoModelForCausalLM.from_config(load_config(str(tmp_path), ModelSection()))
