"""format=gguf with llama.cpp: its llama-quantize, and llama-cpp-python that reads what was written."""

import re
import shutil
import stat
import sys
from pathlib import Path

import pytest
from gguf import GGUFWriter

from tests.export.conftest import Main

READS, WEIGHTS = "llama.cpp reads the trained model", "every written weight is the trained model's"
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
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"out-q4_k_m.gguf", "Modelfile", "README.md"}


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


@pytest.mark.parametrize("block", [512, 7])
def test_llama_cpp_answers_as_the_trained_model(export: Main, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """However many tokens it is given at once: a document of several blocks has the same logits."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    monkeypatch.setattr("launcher.export.gguf_proof.TOKENS_AT_ONCE", block)
    done = export("format=gguf")
    assert done.code == 0, done.err
    verdicts = {verdict["claim"]: verdict for verdict in done.report["verdicts"]}
    found = re.search(r"mean KL (\S+), (\d) of 4 greedy answers", verdicts[READS]["evidence"])
    assert found and float(found[1]) < 1e-6
    assert int(found[2]) >= 3  # of this small model two tokens may be equally likely, to the last bits of a CPU


def test_llama_cpp_sees_another_tokenizer(export: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    add = GGUFWriter.add_token_merges
    monkeypatch.setattr(GGUFWriter, "add_token_merges", lambda self, merges: add(self, merges[::-1]))
    done = export("format=gguf")
    assert done.code == 4 and {READS, "chats are rendered as in training"} <= done.broken
