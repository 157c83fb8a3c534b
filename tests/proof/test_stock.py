"""Packed blocks become padded sequences of the stock model: every document once, in groups of limited size."""

from collections.abc import Callable
from typing import Any

import torch

from launcher.data.pack.micro_batch import IGNORE, MicroBatch
from launcher.proof.bench.workload import bench_inputs, step_batches
from launcher.proof.stock import collate, grouped, supervised_documents
from tests.conftest import request_for


def test_documents_with_a_target_are_cut_out_of_their_blocks_and_grouped_within_the_limit() -> None:
    ids, labels = torch.arange(20).reshape(2, 10), torch.full((2, 10), IGNORE)
    numbers = torch.tensor([[0] * 4 + [1] * 3 + [2] * 3, [0] * 10])
    labels[0, 0], labels[0, 5], labels[1, 3] = 1, 6, 14
    documents = supervised_documents(MicroBatch(ids, labels, ids, numbers, ids, tokens=20, supervised_tokens=3))
    assert [d.tolist() for d, _ in documents] == [[0, 1, 2, 3], [4, 5, 6], list(range(10, 20))]
    assert documents[1][1].tolist() == [IGNORE, 6, IGNORE]
    assert [[len(d) for d, _ in group] for group in grouped(documents, positions=10)] == [[10], [4, 3]]
    assert [[len(d) for d, _ in group] for group in grouped(documents, positions=3)] == [[10], [4], [3]]


def test_every_document_is_one_padded_sequence_with_its_labels(make_recipe: Callable[..., Any]) -> None:
    request = request_for(make_recipe(data={"validation": 0}, train={"accumulation": 2}, proof={"bench": 2}))
    for batch in step_batches(*bench_inputs(request)):
        padded = collate(batch)
        documents = [pair for micro in batch.micro_batches for pair in supervised_documents(micro)]
        sequences = [pair for group in padded.groups for pair in zip(*group, strict=True)]
        assert len(sequences) == len(documents) > len(batch.micro_batches)
        assert sorted(map(unpadded, sequences)) == sorted(map(unpadded, documents))
        assert padded.supervised_tokens == batch.supervised_tokens > 0
        positions = batch.micro_batches[0].input_ids.numel()
        assert all(ids.numel() <= positions for ids, _ in padded.groups)
        assert {len(ids) for ids, _ in collate(batch, max_positions=1).groups} == {1}


def unpadded(pair: Any) -> tuple[list[int], list[int]]:
    """Ids without the zeros at their end, labels without the IGNOREs."""
    ids, labels = (tensor.tolist() for tensor in pair)
    while ids and ids[-1] == 0:
        ids.pop()
    while labels and labels[-1] == IGNORE:
        labels.pop()
    return ids, labels
