"""Training from Python: the record, the files and the console of one run, and how a run may fail."""

import json
import os
import subprocess
import sys

import pytest

from launcher import api
from launcher.commands.past_run import read_run
from launcher.errors import CheckpointError, ContractError, DiskError, RecipeError
from launcher.model.packed import PackedCausalLM
from launcher.records.past import UnfinishedRun
from launcher.records.run import RunRecord
from launcher.report.html_page import html_of
from launcher.train import loop
from tests.conftest import ROOT, fresh_dynamo
from tests.support.arguments import replaced
from tests.support.records import shown


@pytest.fixture(scope="module")
def finished(small_arguments, tmp_path_factory):
    """A run's record, its folder, a copy of its report, and its arguments."""
    folder = tmp_path_factory.mktemp("api")
    recipe, *overrides = small_arguments
    overrides += [f"run.output_dir={folder / 'run'}", "run.trackers=[tensorboard]", "train.eval_every=1"]
    arguments = (recipe.removeprefix("recipe="), *overrides, f"report={folder / 'copy.json'}")
    with fresh_dynamo():
        record = api.run(*arguments, quiet=True)
    return record, folder / "run", folder / "copy.json", arguments


def test_a_run_returns_the_record_that_its_report_is_written_from(finished, small_model):
    record, folder, copy, _ = finished
    assert isinstance(record, RunRecord) and record.start.run_dir == str(folder)
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(record.as_report()))
    assert copy.read_text() == (folder / "report.json").read_text()
    assert {path.name for path in folder.iterdir()} == {
        "adapter", "checkpoints", "metrics.jsonl", "parts.json", "report.html", "report.json", "status.json",
        "trackers",
    }  # fmt: skip
    assert json.loads((folder / "status.json").read_text()) == {
        "code": 0, "reason": "done", "rank": 0, "step": 2, "resumable": False,
    }  # fmt: skip
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(small_model)  # absolute: it loads from any folder
    assert {path.name for path in (folder / "trackers").iterdir()} == {"tensorboard", "tensorboard.json"}


def test_the_files_of_a_run_hold_the_public_keys(finished):
    _, folder, _, _ = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "eval_loss" in line) for line in lines] == [
        (0, True), (1, False), (1, True), (2, False), (2, True),
    ]  # fmt: skip
    assert {"step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "step_s", "vram_mib"} <= set(lines[1])
    report = json.loads((folder / "report.json").read_text())
    assert {"schema", "recipe", "loss", "elapsed_s", "verdicts", "ranks"} <= set(report)
    assert set(report["loss"]) == {"first", "last", "eval_first", "eval_last", "eval_adapter"}
    rank = report["ranks"][0]
    assert {"rank", "device", "compile", "vram", "tokens_per_s", "supervised_tokens_per_s", "step_ms"} <= set(rank)
    assert {
        "planned_graphs", "graph_breaks", "recompiles", "limit_hits", "forward_s", "backward_s", "cache_hits",
        "graph_hash", "graph_break_reasons", "recompile_reasons",
    } <= set(rank["compile"])  # fmt: skip
    assert {"before_mib", "after_mib", "peak_mib", "phases"} <= set(rank["vram"])
    assert {"median", "p90"} == set(rank["step_ms"])
    assert report["recipe"]["train"]["steps"] == 2
    origins = report["recipe_origins"]
    assert origins["train.steps"] == "command line" and "file" in origins.values() and "train.clip" not in origins


@pytest.mark.usefixtures("clean_dynamo")
@pytest.mark.parametrize("quiet", [True, False])
def test_a_run_prints_its_phases_unless_it_is_quiet_and_a_failure_is_raised(finished, capsys, quiet):
    _, folder, _, arguments = finished
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match="has done 2 of 2"):
        api.run(*arguments, quiet=quiet)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    with pytest.raises(RecipeError, match=r"lora\.targets"):
        api.run(*replaced(arguments, "lora.targets=nothing", f"run.output_dir={folder}-2"), quiet=quiet)
    assert ("reading data" in capsys.readouterr().out) != quiet


@pytest.mark.usefixtures("clean_dynamo")
def test_a_run_that_fails_leaves_its_status(small_arguments, tmp_path, monkeypatch):
    def full(self, *inputs):
        raise OSError(28, "no space left", "a.json")

    monkeypatch.setattr(PackedCausalLM, "forward", full)
    with pytest.raises(DiskError, match="the disk is full: a.json") as caught:
        api.run("tiny", *small_arguments[1:], f"run.output_dir={tmp_path / 'run'}", "compile.mode=off", quiet=True)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["code"], status["reason"]) == (7, str(caught.value))


@pytest.mark.usefixtures("clean_dynamo")
def test_a_run_whose_contract_breaks_leaves_a_report_that_says_why_and_may_start_anew(
    small_arguments, tmp_path, monkeypatch
):
    folder, step = tmp_path / "run", loop._train_step

    def frozen(worker, history, pending):
        first = next(p for p in worker.built.packed.body.layers[0].parameters() if p.requires_grad)
        first.requires_grad_(worker.state.step < 1)
        yield from step(worker, history, pending)

    arguments = ("tiny", *small_arguments[1:], f"run.output_dir={folder}", f"report={tmp_path / 'copy.json'}")
    with monkeypatch.context() as patch, pytest.raises(ContractError, match="frozen in another") as caught:
        patch.setattr(loop, "_train_step", frozen)
        api.run(*arguments, quiet=True)
    report, page = json.loads((folder / "report.json").read_text()), (folder / "report.html").read_text()
    assert (tmp_path / "copy.json").read_text() == (folder / "report.json").read_text()
    assert report["ending"] == json.loads((folder / "status.json").read_text())
    [explanation] = report["ending"]["explanations"]
    assert explanation == vars(caught.value.explanations[0]) and explanation["now"] == "requires_grad=0"
    assert report["loss"]["first"] == report["loss"]["last"] is not None and report["ending"]["step"] == 1
    assert report["start"]["model"] and report["recipe_origins"]["lora.r"] == "command line"
    run = read_run(str(folder))
    assert isinstance(run, UnfinishedRun) and json.loads(json.dumps(run.as_report())) == report
    for text in (page, shown(run), html_of(run)):
        assert "Why it broke" in text and explanation["remedy"] in text and "requires_grad=0" in text
    api.run(*arguments, quiet=True)
    assert "ending" not in json.loads((folder / "report.json").read_text())


def test_another_mode_and_several_processes_are_refused(monkeypatch):
    with pytest.raises(RecipeError, match=r"run\(\) trains; got mode=preview"):
        api.run("tiny", "mode=preview")
    started = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=r"run\(\) trains in one process; 2 were started"):
        api.run("tiny")


def test_a_notebook_gets_its_memory_compiler_and_signal_handlers_back(small_arguments, tmp_path):
    """In a process that has not imported torch, after a run that failed once its contract was armed."""
    script = tmp_path / "notebook.py"
    script.write_text(
        "import gc, signal, sys\n"
        "from launcher import api\n"
        "from launcher.errors import DiskError\n"
        "from launcher.runtime import clock\n"
        "clock.process_started_s = lambda: clock.boot_clock_s() - 1e9\n"
        "assert 'torch' not in sys.modules\n"
        "from launcher.checkpoint.run_files import RunFiles\n"
        "show = RunFiles.show\n"
        "def full(self, event):\n"
        "    show(self, event)\n"
        "    if event == 'saving adapter': raise OSError(28, 'no space left', 'a.json')\n"
        "RunFiles.show = full\n"
        "try: api.run('tiny', *sys.argv[1:], 'run.output_dir=failed', quiet=True)\n"
        "except DiskError: pass\n"
        "else: raise AssertionError\n"
        "import torch, torch._dynamo\n"
        "double = torch.compile(lambda x: 2 * x, backend='eager', dynamic=False)\n"
        "double(torch.ones(2)), double(torch.ones(3))\n"
        "RunFiles.show = show\n"
        "record = api.run('tiny', *sys.argv[1:], 'run.output_dir=done', quiet=True)\n"
        "assert record.elapsed_s['imports'] < 1e6, 'they count from the call, not from the process'\n"
        "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "torch._dynamo.reset()\n"
        "gc.collect()\n"
        "assert not [o for o in gc.get_objects() if type(o).__name__ in ('PackedCausalLM', 'Worker')]\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), *small_arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
