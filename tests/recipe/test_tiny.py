"""What recipes/tiny ships: a pretrained base, a tokenizer with exact masks, and splits that share nothing."""

import hashlib
import importlib
import json
import math
import re

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from launcher.recipe.field_types import recipes_dir

TINY = recipes_dir() / "tiny"
Messages = list[dict[str, str]]
CONVERSATION: Messages = [
    {"role": "system", "content": "Answer as a dictionary does."},
    {"role": "user", "content": 'Define the noun "beagle", a kind of hound.'},
    {"role": "assistant", "content": "beagle (noun, animal): a small hound"},
    {"role": "user", "content": "\n And “naïve” 犬?"},
    {"role": "assistant", "content": ""},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY / "base")


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32).eval()


def read_rows(name: str) -> list[Messages]:
    return [json.loads(line)["messages"] for line in (TINY / name).read_text("utf-8").splitlines()]


def headwords_and_glosses(rows: list[Messages]) -> tuple[set[str], set[str]]:
    """Of rows whose answer reads "headword (part, field): gloss"."""
    answers = [re.fullmatch(r"(.+) \((?:noun|verb), [a-z]+\): (.+)", row[1]["content"]) for row in rows]
    assert all(answers)
    return {match[1].lower() for match in answers if match}, {match[2].lower() for match in answers if match}


def mean_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    """Nats per token over the texts, each closed by the end token."""
    batch = tokenizer([t + tokenizer.eos_token for t in texts], padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        return model(**batch, labels=labels).loss.item()


def test_what_ships_fits_in_30_mb_and_has_its_hash_in_the_readme():
    hashes = re.findall(r"^([0-9a-f]{64})  (\S+)$", (TINY / "README.md").read_text("utf-8"), re.MULTILINE)
    files = [path for path in TINY.rglob("*") if path.is_file()]
    files = [path for path in files if not {"build", "__pycache__"} & set(path.relative_to(TINY).parts)]
    assert 10_000_000 < sum(path.stat().st_size for path in files) <= 30_000_000  # the lower bound: with the weights
    data = [path for path in files if path.suffix not in {".py", ".md"}]
    computed = {(hashlib.sha256(path.read_bytes()).hexdigest(), str(path.relative_to(TINY))) for path in data}
    assert computed == set(hashes)


@pytest.mark.parametrize("text", ["a small hound", "  two  spaces\n\n\ttab ", "naïve “犬” 🙂 \x00", "0123.45e-6"])
def test_any_text_round_trips_through_the_tokenizer(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_begin_end_and_pad_are_three_tokens_and_the_model_agrees(tokenizer, base):
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert (base.config.eos_token_id, base.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert base.config.vocab_size == len(tokenizer)


def test_the_mask_covers_each_answer_and_its_end_and_nothing_else(tokenizer):
    rendered = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = rendered["input_ids"], rendered["assistant_masks"]
    supervised = [token for token, masked in zip(ids, mask, strict=True) if masked]
    answers = [tokenizer(CONVERSATION[turn]["content"], add_special_tokens=False)["input_ids"] for turn in (2, 4)]
    assert supervised == [*answers[0], tokenizer.eos_token_id, *answers[1], tokenizer.eos_token_id]
    assert ids.count(tokenizer.eos_token_id) == 5  # the other three turns end unsupervised


@pytest.mark.parametrize("turns", [2, 4])
def test_a_prompt_is_token_by_token_the_start_of_the_longer_chat(tokenizer, turns):
    ids = tokenizer.apply_chat_template(CONVERSATION[:turns], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(CONVERSATION[: turns + 1])["input_ids"]
    assert whole[: len(ids)] == ids and len(whole) > len(ids)


def test_an_unknown_role_is_refused_by_the_template(tokenizer):
    with pytest.raises(Exception, match="unknown role: judge"):
        tokenizer.apply_chat_template([{"role": "judge", "content": "x"}])


def test_train_and_validation_share_no_headword_and_no_gloss():
    train, validation = read_rows("train.jsonl"), read_rows("validation.jsonl")
    assert len(train) == 4000 and len(validation) == 256
    for in_train, held_out in zip(headwords_and_glosses(train), headwords_and_glosses(validation), strict=True):
        assert len(held_out) == 256 and not in_train & held_out


def test_the_shipped_base_is_a_language_model_of_glosses_it_never_saw(tokenizer, base):
    texts = []
    for question, answer in read_rows("validation.jsonl")[:48]:
        kind = re.search(r", a kind of (.+)\.", question["content"])
        headword, gloss = answer["content"].split(" (")[0], answer["content"].split("): ")[1]
        texts += [f"{headword[0].upper()}{headword[1:]} is a kind of {kind[1]}: {gloss}."] if kind else []
    assert len(texts) > 30
    assert mean_loss(base, tokenizer, texts) < 3.0
    assert mean_loss(LlamaForCausalLM(base.config).eval(), tokenizer, texts) > 0.9 * math.log(base.config.vocab_size)


def test_a_held_out_gloss_is_recognised_whatever_its_case_and_punctuation(monkeypatch):
    monkeypatch.syspath_prepend(str(TINY))
    extract, wordnet = importlib.import_module("extract"), importlib.import_module("wordnet")
    line = '02088364 05 n 01 beagle 0 001 @ 02087551 n 0000 | a small short-legged hound; "the beagle ran"  '
    beagle = wordnet.parse_line(line)
    assert (beagle.words, beagle.field, beagle.relations) == (("beagle",), "animal", {"@": [("n", "02087551")]})
    assert (beagle.gloss, beagle.examples) == ("a small short-legged hound", ("the beagle ran",))
    glosses = extract.by_opening([beagle])
    assert extract.echoes("It was: A small, short-legged hound!", glosses)
    assert not extract.echoes("It was a small short-legged horse", glosses)
