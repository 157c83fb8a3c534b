"""What a run says of itself at its start."""

import pytest
import torch

from launcher.recipe.lora_section import LoraSection
from launcher.records.run import EvalRecord
from launcher.train import describe
from launcher.train.describe import adapter_in_words, first_loss_note, slow_dtype_note
from tests.support.records import step_record

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


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (EvalRecord(0, 9.02), True),
        (EvalRecord(0, 9.01), True),  # of weights that are all zero: ln(8192) = 9.0109
        (EvalRecord(0, 8.5), False),
        (EvalRecord(8, 20.0), False),  # a run whose metrics were lost
        (step_record(1, loss=30.0), True),
        (step_record(2, loss=30.0), False),
        (step_record(1, loss=3.0), False),
    ],
)
def test_a_first_loss_that_is_no_better_than_a_guess_is_noted(first, said):
    [*notes] = first_loss_note(first, 8192)
    assert bool(notes) == said
    assert all("ln(8,192) = 9.01" in note for note in notes)


def test_an_adapter_is_told_by_its_rank_its_alpha_and_what_is_not_the_default():
    assert adapter_in_words(LoraSection()) == "r 16, alpha 32"
    told = adapter_in_words(LoraSection(r=8, dora=True, rslora=False, targets=["q_proj"], init="gaussian"))
    assert told == "r 8, alpha 32 · targets ['q_proj'], init gaussian, dora"
