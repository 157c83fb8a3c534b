"""format=gguf: one file that other code reads as the trained model; what it cannot hold is refused by name."""

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.errors import RecipeError
from launcher.export import gguf_file, gguf_vocabulary, merge
from launcher.model.families import FAMILIES
from tests.conftest import TINY, small_config
from tests.export.conftest import Main, Outcome, trained
from tests.support.gguf_files import opened_with, small_base
from tests.support.resident import resident_kib

CLAIMS = 8  # of an export without llama-cpp-python
WEIGHTS, LOSS = "every written weight is the trained model's", "the loss is the trained model's"
KL = "next tokens have the trained model's probabilities"


def refused(done: Outcome, claims: set[str]) -> None:
    assert done.code == 4 and "out.unproven" in done.out, done.err
    assert claims <= done.broken, done.broken
    assert len(done.err[done.err.index("error: ") :].strip().splitlines()) <= 5


def test_a_file_has_weights_tokenizer_template_and_stops_and_says_how_to_use_it(
    export: Main, run_folder: Path, tmp_path: Path
) -> None:
    done = export("format=gguf")
    assert done.code == 0, done.err
    assert done.report["holds"] and len(done.report["verdicts"]) >= CLAIMS and done.report["dtype"] == "f16"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"out-f16.gguf", "Modelfile", "README.md"}
    assert "ollama create out" in done.out and "Converting" not in done.err
    fields = GGUFReader(tmp_path / "out" / "out-f16.gguf").fields
    saved = AutoTokenizer.from_pretrained(run_folder / "adapter")
    told = {key: fields[f"tokenizer.{key}"].contents() for key in ("chat_template", "ggml.pre", "ggml.eos_token_id")}
    assert told == {"chat_template": saved.chat_template, "ggml.pre": "gpt-2", "ggml.eos_token_id": 2}
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert 'FROM ./out-f16.gguf\nPARAMETER stop "<|end|>"\nTEMPLATE """' in modelfile
    where: Any = {"gguf_file": "out-f16.gguf"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **where)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", **where)
    assert tokenizer("A heron.")["input_ids"] == saved("A heron.")["input_ids"] and model.config.eos_token_id == 2


@pytest.mark.parametrize(
    "options", [("quantization=q8_0",), ("quantization=bf16", "on=original"), ("quantization=q8_0", "on=original")]
)
def test_each_type_is_proved_on_either_base(export: Main, options: tuple[str, ...]) -> None:
    done = export("format=gguf", *options)
    assert done.code == 0, done.err
    assert f"-{done.report['dtype']}.gguf" in str(done.report["files"])


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "changes", "told"),
    [
        ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, "does not read rope_parameters"),
        ("mistral", {"sliding_window": 128}, "128 positions"),
        ("qwen3", {"head_dim": 32}, "does not read head_dim"),
    ],
)
def test_every_family_is_written(
    main: Main,
    small_arguments: tuple[str, ...],
    tmp_path: Path,
    model_type: str,
    changes: dict[str, Any],
    told: str,
) -> None:
    base = small_base(small_config(model_type, **changes), tmp_path / "base")
    trained(small_arguments, tmp_path / "run", f"model.name={base}", "train.steps=2")
    done = main("mode=export", "run=run", "to=out", "format=gguf", "report=report.json")
    assert done.code == 0, done.err
    assert told in " ".join(done.report["notes"])
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out" / "out-f16.gguf").tensors}
    assert ("rope_freqs.weight" in tensors) == (model_type == "llama")
    assert ("output.weight" in tensors) != changes.get("tie_word_embeddings", False)


def test_a_family_without_a_known_architecture_of_llama_cpp_is_refused_by_name() -> None:
    assert gguf_file.ARCHITECTURES.keys() < FAMILIES.keys()
    plan: Any = SimpleNamespace(run=SimpleNamespace(config=SimpleNamespace(model_type="gemma2")))
    with pytest.raises(
        RecipeError, match="gguf writes the architectures llama, mistral, qwen3; this model is 'gemma2'"
    ):
        gguf_file.plan_gguf(plan, "f16")


# Faults: test_planted.py has those of the update.


def test_rows_of_q_and_k_that_stay_where_they_are(
    export: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "interleaved", lambda weight, width: weight)
    refused(export("format=gguf"), {WEIGHTS, LOSS})


def test_other_frequencies_of_rotation(
    main: Main, small_arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small_base(small_config(rope_parameters=LLAMA3), tmp_path / "base")
    trained(small_arguments, tmp_path / "run", f"model.name={base}", "train.steps=2")
    factors = gguf_file.rope_factors
    monkeypatch.setattr(gguf_file, "rope_factors", lambda run: factors(run) * 1.01)
    refused(main("mode=export", "run=run", "to=out", "format=gguf", "report=report.json"), {WEIGHTS})


def test_another_chat_template_in_the_file(export: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    add = GGUFWriter.add_chat_template
    monkeypatch.setattr(GGUFWriter, "add_chat_template", lambda self, text: add(self, text.replace("user", "human")))
    refused(export("format=gguf"), {"chats are rendered as in training"})


def test_another_stop_token_in_the_file(export: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_vocabulary, "_stops", lambda run: (7,))
    refused(export("format=gguf"), {"answers end at the trained model's stop tokens"})


def test_another_base_of_rotation_in_the_file(export: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    add = GGUFWriter.add_rope_freq_base
    monkeypatch.setattr(GGUFWriter, "add_rope_freq_base", lambda self, theta: add(self, theta * 4))
    refused(export("format=gguf"), {KL})


# What cannot be written


@pytest.mark.parametrize(
    ("missing", "options", "says"),
    [
        ("gguf", (), "pip install 'gguf"),
        ("llama-quantize", ("quantization=q4_k_m",), "use quantization=q8_0"),
        ("transformers", (), "5.17.0 is installed"),
    ],
)
def test_a_tool_that_is_missing_is_told_before_torch_is_imported(
    export: Main, monkeypatch: pytest.MonkeyPatch, missing: str, options: tuple[str, ...], says: str
) -> None:
    monkeypatch.setattr("launcher.export.place.shutil.which", lambda name: None if name == missing else name)
    monkeypatch.setattr("launcher.export.place.importlib.util.find_spec", lambda name: None if name == missing else 1)
    old, found = {"transformers": "5.17.0"} if missing == "transformers" else {}, metadata.version
    monkeypatch.setattr("launcher.export.place.metadata.version", lambda name: old.get(name) or found(name))
    monkeypatch.setattr("launcher.export.load_run.open_run", lambda *_: pytest.fail("too late"))
    done = export("format=gguf", *options)
    assert done.code == 2 and says in done.err


def test_memory_that_the_proof_lacks_is_told_before_anything_is_written(
    export: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20, total=2**30))
    done = export("format=gguf")
    assert done.code == 6 and "1 MiB are available" in done.err and "format=merged" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type=linear"),
        ({"attention_bias": True}, "bias, which llama.cpp.s llama lacks"),
        ({"vocab_size": 4000}, "4,096 tokens for 4,000 embeddings"),
    ],
)
def test_a_model_that_llama_cpp_does_not_compute_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    run = opened_with(small_base(small_config(**changes), tmp_path), AutoTokenizer.from_pretrained(TINY / "base"))
    with pytest.raises(RecipeError, match=f"{says}.\nUse format=merged"):
        gguf_file.plan_gguf(merge.plan_merge(run, on="dequantised", dtype=torch.float32), "f16")


def test_no_more_than_one_tensor_is_in_memory(tmp_path: Path) -> None:
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 10, "head_dim": 192}
    base = small_base(small_config(**size), tmp_path / "base", dtype=torch.bfloat16)
    run = opened_with(base, AutoTokenizer.from_pretrained(TINY / "base"))
    plan = gguf_file.plan_gguf(merge.plan_merge(run, on="dequantised", dtype=torch.float32), "f16")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (man 5 proc)
    before = resident_kib("VmRSS")
    done: list[int] = []
    gguf_file.write_gguf(plan, {}, tmp_path / "out.gguf", progress=done.append)
    assert (
        done == [*range(1, len(plan.names) + 1)] and (tmp_path / "out.gguf").stat().st_size > plan.nbytes > 190 * 2**20
    )
    assert resident_kib("VmHWM") - before < 120 * 1024


def test_q8_0_is_within_the_rounding_of_its_blocks_and_no_further() -> None:
    from launcher.export.gguf_proof import _is_near

    torch.manual_seed(0)
    weight = torch.randn(8, 256)
    tensor = small_tensor(quantize(weight.numpy(), gguf_file.TYPES["q8_0"][0]))
    assert _is_near(tensor, weight)
    worse = weight.clone()
    worse[3, 5] += weight[3, :32].abs().max() / 127
    assert not _is_near(tensor, worse)
    assert np.abs(dequantize(tensor.data, tensor.tensor_type) - weight.numpy()).max() > 1e-3


def small_tensor(data: Any) -> Any:
    return SimpleNamespace(data=data, tensor_type=gguf_file.TYPES["q8_0"][0])
