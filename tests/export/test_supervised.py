"""Logits of supervised tokens: the same as of whole documents one by one, in chunks and batches of bounded size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.data.documents import Document
from launcher.errors import RecipeError
from launcher.export import proof, supervised
from launcher.export.supervised import batches_by_length, check_head, supervised_logits

VOCABULARY, CHUNK_ROWS = 8192, 7


def documents_of(*lengths: int) -> list[Document]:
    random = np.random.default_rng(0)
    return [
        Document(random.integers(1, VOCABULARY, length, dtype=np.int32), random.random(length) < 0.5)
        for length in lengths
    ]


@pytest.fixture(scope="module")
def model(small_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(small_model).eval()


@torch.inference_mode()
def test_padded_and_in_chunks_the_logits_are_those_of_each_document_alone(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "CHUNK_BYTES", CHUNK_ROWS * 4 * VOCABULARY)
    documents = documents_of(40, 9, 23)
    chunks = list(supervised_logits(model, documents))
    assert len(chunks) > 3 and max(len(logits) for logits, _ in chunks) == CHUNK_ROWS
    expected, targets = [], []
    for document in documents:
        ids = torch.tensor(document.input_ids, dtype=torch.long)
        rows = torch.tensor(document.supervised)[1:]
        expected.append(model(input_ids=ids[None]).logits[0, :-1][rows])
        targets.append(ids[1:][rows])
    assert torch.equal(torch.cat([found for _, found in chunks]), torch.cat(targets))
    torch.testing.assert_close(torch.cat([found for found, _ in chunks]), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_a_model_that_caps_its_logits_after_the_head_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    [document] = documents_of(12)
    check_head(model, document)
    original = type(model).forward

    def capped(self: Any, **inputs: Any) -> Any:
        output = original(self, **inputs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    monkeypatch.setattr(type(model), "forward", capped)
    with pytest.raises(RecipeError, match="computes something after the head"):
        check_head(model, document)


def test_long_documents_of_a_proof_are_cut_with_a_target_in_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "PROVED_POSITIONS", 64)
    targets = np.zeros(500, bool)
    targets[[0, 400, 499]] = True  # the first position is none: nothing predicts it
    parts = [
        Document(np.arange(500), targets),
        Document(np.arange(500), ~targets),
        Document(np.arange(64), ~targets[:64]),
    ]
    cut = [proof._cut(document) for document in parts]
    assert [(len(part), int(part.input_ids[0])) for part in cut] == [(64, 368), (64, 0), (64, 0)]
    assert all(part.supervised[1:].any() for part in cut)


def test_batches_hold_every_document_once_the_longest_first_within_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "BATCH_POSITIONS", 100)
    documents = documents_of(20, 300, 33, 50, 49, 20, 20)
    batches = list(batches_by_length(documents))
    assert [[len(document) for document in batch] for batch in batches] == [[300], [50, 49], [33, 20, 20], [20]]
    assert {id(document) for batch in batches for document in batch} == {id(document) for document in documents}
    assert list(batches_by_length([])) == []
