"""Many tensors are copied in few pieces and come back as they were; tests/gpu/test_state.py: behind the next steps."""

import pytest
import torch

from launcher.train import host_copies
from launcher.train.host_copies import HostCopies


@pytest.fixture
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory needs a GPU."""
    empty = torch.empty
    monkeypatch.setattr(host_copies.torch, "empty", lambda *shape, pin_memory, **options: empty(*shape, **options))


@pytest.mark.parametrize("piece_bytes", [1, 64, 2**20])
def test_copies_have_the_values_shapes_and_dtypes_of_the_tensors(
    monkeypatch: pytest.MonkeyPatch, unpinned: None, piece_bytes: int
) -> None:
    monkeypatch.setattr(host_copies, "PIECE_BYTES", piece_bytes)
    bytes_ = torch.arange(9, dtype=torch.uint8)
    tensors = [torch.randn(3, 4), bytes_, torch.tensor(7.0), torch.randn(5, 9), torch.randn(4, 2).t(), torch.zeros(0)]
    copies = HostCopies()
    for _ in range(2):
        found = copies.begin(tensors)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, found, strict=True))
        bytes_.add_(1)
        assert not torch.equal(found[1], bytes_)


def test_memory_is_made_once_and_anew_for_other_tensors(unpinned: None) -> None:
    copies, tensor = HostCopies(), torch.randn(6)
    [first] = copies.begin([tensor])
    [again] = copies.begin([tensor])
    [other] = copies.begin([torch.ones(6)])
    assert first.data_ptr() == again.data_ptr() != other.data_ptr()
    assert other.sum() == 6
