"""What a run says of itself at its start."""

import pytest
import torch

from launcher.train import describe
from launcher.train.describe import slow_dtype_note

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "dtype", "slow"),
    [
        ("flags\t: fpu avx2 f16c", torch.bfloat16, True),
        ("flags\t: fpu avx2 f16c", torch.float16, True),
        ("flags\t: fpu avx2 f16c", torch.float32, False),
        ("flags\t: avx512f avx512_bf16", torch.bfloat16, False),
        ("flags\t: avx512f avx512_bf16", torch.float16, True),
        ("flags\t: amx_tile amx_bf16", torch.bfloat16, False),
        ("Features\t: fp asimd bf16", torch.bfloat16, False),
        ("Features\t: fp asimdhp", torch.float16, False),
    ],
)
def test_a_dtype_for_which_the_cpu_has_no_instructions_is_said_to_be_slow(tmp_path, monkeypatch, flags, dtype, slow):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    monkeypatch.setattr(describe, "CPU_INFO", str(tmp_path / "cpuinfo"))
    note = slow_dtype_note(dtype, CPU)
    assert bool(note) == slow
    assert all("model.dtype=float32" in text and str(dtype).removeprefix("torch.") in text for text in note)


def test_nothing_is_said_of_a_gpu_nor_of_a_cpu_that_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(describe, "CPU_INFO", str(tmp_path / "none"))
    assert slow_dtype_note(torch.bfloat16, CPU) == slow_dtype_note(torch.bfloat16, torch.device("cuda")) == ()
