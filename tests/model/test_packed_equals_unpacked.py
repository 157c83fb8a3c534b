"""What packing promises: a document in a block, compiled, learns what it would learn alone, in stock transformers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from launcher.data.documents import Document, Documents
from launcher.data.pack.micro_batch import micro_batch_of
from tests.support.packed_and_alone import (
    LENGTHS,
    PackedAndAlone,
    alone_loss,
    packed_and_alone,
    random_documents,
    take_gradients,
)
from tests.support.tensors import relative_error


@pytest.fixture(scope="module")
def pair(small_model: Path) -> Iterator[PackedAndAlone]:
    with packed_and_alone("cpu", model=small_model, dtype="float32", backend="aot_eager") as models:
        yield models


def largest_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))


def test_each_document_of_a_packed_batch_has_the_loss_it_has_alone(pair: PackedAndAlone) -> None:
    packed, alone = pair.losses()
    with torch.no_grad():
        whole = float(pair.packed_loss())
    assert packed == pytest.approx(alone, rel=1e-5)
    assert whole == pytest.approx(sum(alone), rel=1e-5)
    assert len({round(loss, 3) for loss in alone}) == len(LENGTHS)
    pair.plan.check()


def test_the_gradients_of_a_packed_batch_are_those_of_its_documents_one_by_one(pair: PackedAndAlone) -> None:
    packed, alone = pair.gradients()
    assert largest_error(packed, alone) < 1e-5
    assert all(float(gradient.norm()) > 1e-3 for gradient in alone)
    alone_loss(pair.stock, random_documents(0)[1]).backward()
    assert largest_error(packed, take_gradients(pair.stock)) > 0.1  # one document's would not do
    pair.plan.check()


@pytest.mark.parametrize("poisoned", [0, 3, 7])
def test_a_poisoned_document_changes_no_other_documents_loss_and_no_gradient_of_theirs(
    pair: PackedAndAlone, poisoned: int
) -> None:
    documents = random_documents(0)
    documents[poisoned] = Document(random_documents(1)[poisoned].input_ids, documents[poisoned].supervised)
    blocks = replace(pair.blocks, documents=Documents.of(documents))
    batch = micro_batch_of(blocks, np.array([0, 1, 2, -1]))
    with torch.no_grad():
        before, after = (torch.stack([pair.loss_of(d, b) for d in range(len(LENGTHS))]) for b in (pair.batch, batch))
    changed = (before != after).tolist()
    assert changed == [document == poisoned for document in range(len(LENGTHS))]
    other, gradients = (poisoned + 1) % len(LENGTHS), []
    for either in (pair.batch, batch):
        pair.loss_of(other, either).backward()
        gradients.append(take_gradients(pair.packed))
    assert largest_error(*gradients) < 1e-6
    pair.plan.check()
