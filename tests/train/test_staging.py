"""A micro batch goes through one buffer and comes out as it was, at addresses that stay."""

import torch

from launcher.train.staging import Staging


def fields(seed, *, rows=3, width=5):
    """The tensors of a micro batch, of sizes that no alignment divides."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape, dtype):
        return torch.randint(-100, 2**31 - 1, shape, generator=generator, dtype=torch.int64).to(dtype)

    wide = [drawn(rows, width, dtype=torch.int64) for _ in range(3)]
    return [*wide, drawn(rows, width, dtype=torch.int32), drawn(7, dtype=torch.int32)]


def test_what_is_sent_comes_out_unchanged_in_dtype_shape_and_value():
    staging = Staging(fields(0), torch.device("cpu"))
    for seed in range(3):
        sent = fields(seed)
        staging.fill(sent, factor=1 / (seed + 3))
        received = staging.inputs()
        for tensor in sent:
            tensor.zero_()  # the sender may use them again at once
        assert [t.dtype for t in received] == [t.dtype for t in sent]
        assert all(torch.equal(a, b) for a, b in zip(received, fields(seed), strict=True))
        assert all(t.is_contiguous() for t in received)
        torch.testing.assert_close(float(staging.factor), 1 / (seed + 3))
    assert not torch.equal(fields(0)[0], fields(1)[0])


def test_the_device_side_stays_where_it_is_and_fields_begin_at_sixteen_bytes():
    staging = Staging(fields(0), torch.device("cpu"))
    staging.fill(fields(0), factor=1.0)
    before = [t.data_ptr() for t in staging.inputs()[3:]], staging.factor.data_ptr()
    staging.fill(fields(1), factor=2.0)
    assert ([t.data_ptr() for t in staging.inputs()[3:]], staging.factor.data_ptr()) == before
    start = staging.inputs()[3].untyped_storage().data_ptr()
    assert all((t.data_ptr() - start) % 16 == 0 for t in staging.inputs()[3:])
