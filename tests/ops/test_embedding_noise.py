"""NEFTune's noise is transformers' own for a document alone, and does not depend on what it is packed with."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from launcher.ops.embedding_noise import embedding_noise
from tests.support.models import LENGTHS, packed_batch, packed_form

ALPHA, WIDTH = 5.0, 64


def test_a_document_alone_gets_the_noise_that_transformers_adds() -> None:
    embedded, ends = torch.randn(1, 20, WIDTH), torch.tensor([0, 20], dtype=torch.int32)
    torch.manual_seed(1)
    noise = embedding_noise(embedded, ends, ALPHA)
    torch.manual_seed(1)
    module = SimpleNamespace(training=True, neftune_noise_alpha=ALPHA)
    torch.testing.assert_close(embedded + noise, neftune_post_forward_hook(module, None, embedded))


def test_packed_documents_get_noise_by_their_own_length() -> None:
    *_, ends = packed_batch(100)
    noise = embedding_noise(torch.zeros(2, 20, WIDTH), ends, ALPHA).flatten(0, 1)
    bounds = [ALPHA / math.sqrt(length * WIDTH) for length in ends.diff().tolist()]
    largest = [float(part.abs().max()) for part in noise.split(ends.diff().tolist())]
    assert len(bounds) == len(LENGTHS) + 2
    assert all(0.8 * bound < most <= bound for bound, most in zip(bounds, largest, strict=True))


def test_noise_acts_in_training_alone(small_model) -> None:
    from transformers import AutoModelForCausalLM

    model = packed_form(AutoModelForCausalLM.from_pretrained(small_model).requires_grad_(False))
    batch = packed_batch(8192)
    with torch.no_grad():
        clean = model(*batch)
    torch.testing.assert_close(model(*batch), clean)
    model.neftune_alpha = ALPHA
    noisy = [float(model(*batch).detach()) for _ in range(2)]
    assert noisy[0] != noisy[1] and all(abs(loss - float(clean)) > 1e-4 * float(clean) for loss in noisy)
    with torch.no_grad():
        assert torch.equal(model(*batch), clean)


@pytest.mark.parametrize("slots", [2, 7])
def test_unused_slots_of_cu_seqlens_are_no_documents(slots: int) -> None:
    ends = torch.tensor([0, 8, *[20] * slots], dtype=torch.int32)
    noise = embedding_noise(torch.zeros(1, 20, WIDTH), ends, ALPHA)
    assert torch.isfinite(noise).all() and noise[0, 8:].abs().max() <= ALPHA / math.sqrt(12 * WIDTH)
