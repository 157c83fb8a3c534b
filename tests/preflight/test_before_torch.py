"""What needs no torch is refused before torch is imported, in a process of its own."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, TINY

PROGRAM = """
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "tensorboard" else find_spec(name, *rest)
sys.argv[:] = [{main!r}, "recipe=tiny", *sys.argv[1:]]
try: runpy.run_path(sys.argv[0], run_name="__main__")
finally: print(*{{"torch", "transformers"}} & set(sys.modules))
"""


@pytest.fixture
def folder(tmp_path):
    """A working directory with what the cases name."""
    config = json.loads((TINY / "base" / "config.json").read_text())
    for name, others in {"gpt2": {"model_type": "gpt2"}, "headless": {"num_attention_heads": 0}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | others))
    (tmp_path / "taken" / "adapter").mkdir(parents=True)
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["model.name=./gpt2"], 2, "this model is 'gpt2'"),
        (["model.name=./gpt2", "model.init=random", "mode=preview"], 2, "this model is 'gpt2'"),
        (["model.name=./headless"], 2, "num_attention_heads must be"),
        (["model.name=./headless", "mode=parity"], 2, "num_attention_heads must be"),
        (["data.max_length=100000"], 2, "data.max_length may be at most"),
        (["run.output_dir=taken"], 4, "must not hold another run"),
        (["run.output_dir=file/run"], 2, "must be a folder that can be written"),
        (["run.resume=./nowhere"], 4, "which is no folder; checkpoints there: none"),
        (["run.trackers=tensorboard"], 2, "run.trackers must be installed"),
        (["report=nowhere/report.json"], 2, "report=PATH must be a file"),
        (["lora.start_from=./gone"], 2, "lora.start_from must be a folder or a hub id"),
        (["lora.start_from=runs/gone"], 2, "there is no folder runs/gone"),
        (["lora.start_from=taken/adaptor"], 2, "there is no folder taken/adaptor"),
        (["lora.start_from=./taken/adapter"], 2, "has no adapter_config.json"),
        (["data.sources=./gone.jsonl"], 3, "no such file or folder"),
        (["data.validation=./gone.jsonl", "mode=bench"], 3, "no such file or folder"),
    ],
)
def test_it_is_refused_before_torch_and_leaves_nothing(folder, arguments, code, says):
    before = sorted(folder.rglob("*"))
    program = PROGRAM.format(main=str(ROOT / "launcher" / "main.py"))
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True, text=True)
    assert says in done.stderr
    assert (done.returncode, done.stdout.strip()) == (code, "")
    assert sorted(folder.rglob("*")) == before
