"""A run outlives the terminal, the pipe or the log that watches it."""

import json
import shlex
import subprocess

import pytest

from tests.support.arguments import replaced
from tests.support.launches import ALONE, MAIN

SHORT = ("compile.mode=off", "train.steps=3", "run.output_dir=out")


@pytest.mark.faults
@pytest.mark.parametrize("console", ["| head -n 3", "> /dev/full", ">&- 2>&-"])
def test_fault_39_a_run_goes_on_and_saves_without_a_console(small_arguments, tmp_path, console):
    command = shlex.join(map(str, [*ALONE, MAIN, *replaced(small_arguments, *SHORT)]))
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{command} {console}"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").stat().st_size > 1000
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["code"] == 0
    lost = console in ("| head -n 3", "> /dev/full")
    assert status["reason"] == "done" + ("; the console was closed on the way" if lost else "")
