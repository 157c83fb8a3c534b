"""format=gguf: one file that other code reads as the trained model; what it cannot hold is refused by name."""

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, dequantize, quantize
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from launcher.errors import RecipeError
from launcher.export import gguf_file, gguf_vocabulary, merge
from launcher.export.gguf_vocabulary import SPLITS
from launcher.model.families import FAMILIES
from tests.conftest import TINY, small_config
from tests.export.conftest import Main, Outcome, trained
from tests.support.gguf_files import opened_with, small_base
from tests.support.resident import resident_kib

CLAIMS = 8  # of an export without llama-cpp-python
WEIGHTS, LOSS = "every written weight is the trained model's", "the loss is the trained model's"


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
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"out-f16.gguf", "Modelfile"}
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


def test_each_family_has_an_architecture_of_llama_cpp() -> None:
    assert gguf_file.ARCHITECTURES.keys() == FAMILIES.keys()


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
    refused(export("format=gguf"), {LOSS})


# llama-quantize


TOOL = """#!/usr/bin/env python3
import sys
import numpy as np
from gguf import GGUFReader
source, target, kind = sys.argv[1:]
assert kind == "Q4_K_M" and GGUFReader(source).tensors[0].tensor_type == 0, "a file in fp32"
data = bytearray(open(source, "rb").read())
{change}
open(target, "wb").write(data)
"""


def tool(folder: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Puts a llama-quantize on PATH that copies the file, with `change`."""
    import sys

    path = folder / "bin" / "llama-quantize"
    path.parent.mkdir()
    path.write_text(TOOL.format(change=change).replace("/usr/bin/env python3", sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")


def test_llama_quantize_is_given_the_proved_file_in_fp32_which_is_removed(
    main: Main, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path, monkeypatch, "")
    done = main(
        "mode=export", f"run={run_folder}", "to=out", "report=report.json", "format=gguf", "quantization=q4_k_m"
    )
    assert done.code == 0, done.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"out-q4_k_m.gguf", "Modelfile"}


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ("sys.exit('no room: of all')", 2, "no room: of all"),
        (
            "t = GGUFReader(source).tensors[5]; data[t.data_offset : t.data_offset + t.n_bytes] = bytes(t.n_bytes)",
            4,
            WEIGHTS,
        ),
    ],
)
def test_a_llama_quantize_that_fails_or_writes_something_else(
    export: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, code: int, says: str
) -> None:
    tool(tmp_path, monkeypatch, change)
    done = export("format=gguf", "quantization=q4_k_m")
    assert done.code == code and says in done.err
    assert not (tmp_path / "out").exists()


def test_llama_quantize_makes_what_the_proof_accepts(export: Main, tmp_path: Path) -> None:
    if not shutil.which("llama-quantize"):
        pytest.skip("llama.cpp's llama-quantize is not on PATH")
    for quantization in ("q6_k", "q5_k_m", "q4_k_m"):
        done = export("format=gguf", f"quantization={quantization}")
        assert done.code == 0, done.err
        (tmp_path / "out").rename(tmp_path / quantization)


def test_llama_cpp_answers_as_the_trained_model(export: Main) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    done = export("format=gguf")
    assert done.code == 0, done.err
    verdicts = {verdict["claim"]: verdict for verdict in done.report["verdicts"]}
    assert "4 of 4 greedy answers" in verdicts["llama.cpp reads the trained model"]["evidence"]


def test_llama_cpp_sees_a_wrong_pre_tokenizer_and_stop_token(export: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    monkeypatch.setattr(gguf_vocabulary, "_pre_tokenizer", lambda spec: ("tekken", False))
    refused(export("format=gguf"), {"llama.cpp reads the trained model"})


# What cannot be written


@pytest.mark.parametrize(
    ("missing", "options", "says"),
    [
        ("gguf", (), "pip install 'gguf"),
        ("llama-quantize", ("quantization=q4_k_m",), "use quantization=q8_0"),
    ],
)
def test_a_tool_that_is_missing_is_told_before_torch_is_imported(
    export: Main, monkeypatch: pytest.MonkeyPatch, missing: str, options: tuple[str, ...], says: str
) -> None:
    monkeypatch.setattr("launcher.export.place.shutil.which", lambda name: None if name == missing else name)
    monkeypatch.setattr("launcher.export.place.importlib.util.find_spec", lambda name: None if name == missing else 1)
    monkeypatch.setattr("launcher.export.load_run.open_run", lambda *_: pytest.fail("too late"))
    done = export("format=gguf", *options)
    assert done.code == 2 and says in done.err


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


def with_parts(**parts: Any) -> Any:
    """The tiny tokenizer with other parts in its tokenizer.json."""
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY / "base")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    for key, value in parts.items():
        spec[key] = {**spec[key], **value} if key == "model" else value
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))
    return tokenizer


def split_by(expression: str) -> dict[str, Any]:
    made = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return dict(json.loads(made.__getstate__()))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"pre_tokenizer": split_by(r"\p{L}+|.")}, "pre-tokenizer, for which llama.cpp has no name"),
        ({"pre_tokenizer": None}, "pre-tokenizer, for which llama.cpp has no name"),
        ({"model": {"ignore_merges": True}}, "ignore_merges=True with the pre-tokenizer gpt-2"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer"),
        ({"model": {"byte_fallback": True}}, "no byte-level BPE"),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused_by_name(
    small_model: Path, parts: dict[str, Any], says: str
) -> None:
    vocabulary, found = gguf_vocabulary.vocabulary_of(opened_with(small_model, with_parts(**parts)))
    assert vocabulary is None and len(found) == 1 and says in found[0]


def test_pre_tokenizers_are_named_as_transformers_names_them(small_model: Path) -> None:
    assert {name: expression for expression, (name, _) in SPLITS.items()} == {
        name: GGUF_PRE_TOKENIZER_SPLITS[name] for name in ("llama-bpe", "qwen2", "tekken")
    }
    for expression, (name, ignores) in SPLITS.items():
        tokenizer = with_parts(pre_tokenizer=split_by(expression), model={"ignore_merges": ignores})
        vocabulary, _ = gguf_vocabulary.vocabulary_of(opened_with(small_model, tokenizer))
        assert vocabulary is not None and vocabulary.pre == name
    plain, _ = gguf_vocabulary.vocabulary_of(opened_with(small_model, with_parts()))
    assert plain is not None and (plain.pre, plain.bos, plain.eos) == ("gpt-2", True, False)
    composing, _ = gguf_vocabulary.vocabulary_of(opened_with(small_model, with_parts(normalizer={"type": "NFC"})))
    assert composing is not None and "NFC" in composing.notes[0]


def test_stop_tokens_are_the_tokenizers_and_two_more_at_most(small_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    vocabulary, _ = gguf_vocabulary.vocabulary_of(opened_with(small_model, tokenizer, stops=(5, 2, 0)))
    assert vocabulary is not None and vocabulary.stops == (2, 5, 0)
    assert vocabulary.kinds[:7] == [3] * 6 + [1] and vocabulary.kinds[-1] == 5  # control, normal; no token at all
    nothing, found = gguf_vocabulary.vocabulary_of(opened_with(small_model, tokenizer, stops=(5, 4, 2, 0)))
    assert nothing is None and found == ["4 stop tokens (it has 3)"]


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
    from types import SimpleNamespace

    return SimpleNamespace(data=data, tensor_type=gguf_file.TYPES["q8_0"][0])
