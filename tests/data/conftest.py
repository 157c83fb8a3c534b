"""Small byte-level tokenizers: one with control tokens of its own, one per family with the family's."""

import pytest
from hypothesis import HealthCheck, settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.reading import written
from tests.support.templates import CORPUS, FAMILY_TOKENS, OWN_TOKENS, TEMPLATES

# Neither an example nor the drawing of examples is timed: a busy machine fails no test.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def build_tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS * 3, trainer)

    def build(tokens, template):
        """A tokenizer with these control tokens and this chat template."""
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(backend.to_str()), chat_template=template, **tokens
        )

    return build


@pytest.fixture(scope="session")
def make_tokenizer(build_tokenizer):
    def make(template):
        """A tokenizer with the template of that name, or with the template text itself; None gives it none."""
        return build_tokenizer(OWN_TOKENS, TEMPLATES.get(template, template))

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer("llama3")


@pytest.fixture(scope="session")
def make_family(build_tokenizer):
    def make(family, *, template=None):
        """A tokenizer with the family's control tokens; its pad token is its end token."""
        tokens = FAMILY_TOKENS[family]
        tokenizer = build_tokenizer({**tokens, "pad_token": tokens["eos_token"]}, template)
        if family == "qwen3":
            tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
        return tokenizer

    return make


@pytest.fixture
def write(tmp_path):
    """Writes rows (objects as JSON, bytes as they are), a line each, and gives the path."""

    return lambda rows, name="rows.jsonl": str(written(tmp_path / name, rows))
