"""What the tests of models share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Small tensors: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
