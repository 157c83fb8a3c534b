"""The command as a user types it: exit codes, messages of at most five lines, nothing left behind."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from launcher import cli
from launcher.errors import ContractError, DataError
from launcher.records.explanation import Explanation
from launcher.runtime.signals import listening
from tests.conftest import ROOT
from tests.support.arguments import replaced
from tests.support.records import section

HANG_S = 600  # no measure of speed: a process that hangs is to fail a test, not to stop the suite
MAIN = [sys.executable, str(ROOT / "launcher" / "main.py")]


@pytest.fixture
def main(monkeypatch, tmp_path, capsys):
    """The command in this process, in the test's folder: a function of its arguments -> (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = cli.main(arguments)
        return (code, *capsys.readouterr())

    with listening():  # gives the handlers back
        yield run


@pytest.fixture
def small(small_arguments):
    """Arguments of a run that would succeed."""
    return [*small_arguments, "run.output_dir=out"]


@pytest.fixture
def previewed(small, small_model, tmp_path):
    """Arguments of a preview; the model's folder holds no weights."""
    shutil.copytree(small_model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return [*replaced(small, "model.name=./bare"), "mode=preview"]


@pytest.mark.parametrize(
    ("mode", "wrong", "code", "says"),
    [
        ("small", "recipe=nope", 2, "tiny"),
        ("small", "lerning_rate=1", 2, "train.lr"),
        ("small", "model.name=./nowhere", 2, "model.name"),
        ("small", "lora.targets=[nothing]", 2, "q_proj"),
        ("small", "report=./nowhere/report.json", 2, "a folder that can be written"),
        ("small", "run.output_dir=taken", 4, "must not hold another run"),
        ("small", "data.sources=[{path: empty.jsonl}]", 3, "0 usable rows"),
        ("small", "data.sources=[{path: broken.jsonl}]", 3, "broken.jsonl:2"),
        ("previewed", "data.max_length=4096", 2, "data.max_length"),
        ("previewed", "data.sources=[{path: broken.jsonl}]", 3, "broken.jsonl:2"),
        ("previewed", "blocks=none", 2, "a whole number >= 0"),
    ],
)
def test_bad_input_is_a_short_message_with_its_code_and_leaves_nothing(
    main, request, tmp_path, mode, wrong, code, says
):
    arguments = request.getfixturevalue(mode)
    (tmp_path / "taken" / "adapter").mkdir(parents=True)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    before = sorted(tmp_path.rglob("*"))
    returned, _, err = main(*replaced(arguments, wrong))
    assert returned == code, err
    assert says in err
    assert 1 <= len(err.strip().splitlines()) <= 5
    assert f"(exit code {code})" in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("variable", ["ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", None])
def test_under_a_process_launcher_a_message_stands_in_a_frame(main, monkeypatch, variable):
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "no")
    lines = main("recipe=tiny", "lerning_rate=1")[2].splitlines()
    assert [line[0] for line in lines] == (["━", "e", "━"] if variable else ["e"])


def test_a_run_ends_with_0_prints_plain_text_and_leaves_its_files(small, tmp_path):
    done = subprocess.run([*MAIN, *small], capture_output=True, text=True, timeout=HANG_S, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "PASS" in done.stdout
    assert "FAIL" not in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "adapter", "checkpoints", "metrics.jsonl", "parts.json", "report.html", "report.json", "status.json"
    }  # fmt: skip


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_its_code_and_says_so(small, tmp_path, signum, code):
    process = subprocess.Popen(
        [*MAIN, *replaced(small, "train.steps=100000")],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits it ignored
    )
    try:
        metrics = tmp_path / "out" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(signum)
        assert process.wait(timeout=HANG_S) == code
    finally:
        process.kill()
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["code"], status["resumable"]) == (code, True)
    message = process.stderr.read().decode()
    assert f"step {status['step']} is saved" in message
    assert "Traceback" not in message


def test_a_preview_shows_the_blocks_without_weights_and_leaves_nothing(main, previewed, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = main(*previewed, "blocks=3")
    assert code == 0, err
    assert "\x1b" not in out
    assert [line.split("  ")[0] for line in out.splitlines() if line.startswith("─ Block")] == [
        "─ Block 1", "─ Block 2", "─ Block 3"
    ]  # fmt: skip
    assert "⟦<|assistant|>⟧«" in out
    assert re.search(r"rows read +60\b", out)
    assert "auto → assistant in 54 rows" in out  # of the 60, six validate
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def base(small_model, tmp_path):
    """A copy of the small model that may be changed."""
    shutil.copytree(small_model, tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("mode", ["mode=train", "mode=preview"])
@pytest.mark.parametrize(("fault", "code", "says"), [("pad", 2, "pad_token_id"), ("end", 3, "'<|4096|>' (id 8192)")])
def test_ids_beyond_the_embedding_are_refused_before_weights_are_read(main, small, base, mode, fault, code, says):
    if fault == "pad":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"pad_token_id": config["vocab_size"]}))
    else:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_special_tokens({"extra_special_tokens": [f"<|{number}|>" for number in range(4097)]})
        tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "'<|4096|>'")
        tokenizer.save_pretrained(base)
    returned, out, err = main(*replaced(small, "model.name=./base"), mode)
    assert (returned, says in err) == (code, True), err
    assert ("⟦<|4096|>⟧" in out) == (code == 3 and mode == "mode=preview")  # a preview shows where the token stands
    assert len(err.strip().splitlines()) <= 5
    assert not (base.parent / "out").exists()


def test_a_run_and_its_preview_name_an_end_token_that_was_never_trained(main, small, base):
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][AutoTokenizer.from_pretrained(base).eos_token_id] = 0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    arguments = replaced(small, "model.name=./base", "compile.mode=off", "train.steps=1", "run.sample_tokens=0")
    said = "output head was never trained for <|end|> (zero)"
    for mode in ("mode=preview", "mode=train"):
        code, out, err = main(*arguments, mode)
        assert (code, said in " ".join(out.split())) == (0, True), out + err
    assert said in json.loads((base.parent / "out" / "report.json").read_text())["start"]["notes"][0]
    code, out, err = main(*replaced(arguments, "model.init=random", "run.output_dir=random"), "mode=train")
    assert (code, said in " ".join(out.split())) == (0, False), out + err


def test_a_preview_that_nobody_reads_to_its_end_has_no_traceback(previewed, tmp_path):
    command = shlex.join([*MAIN, *previewed])
    done = subprocess.run(f"{command} | head -n 1", shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert len(done.stdout.splitlines()) == 1, done.stderr
    assert done.stderr == ""


@pytest.fixture
def second_of_two(monkeypatch):
    started = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)


def test_of_several_processes_one_previews_and_none_compares(second_of_two, main, previewed):
    assert main(*previewed) == (0, "", "")
    code, _, _ = main(*replaced(previewed, "mode=parity"))
    assert code == 2


def test_a_broken_contract_is_explained_in_a_panel_above_the_error(main, monkeypatch):
    why = Explanation(
        "a batch of 3 is not one of the planned 2", "mine.py:7: x = f(x)", "2", "3", "Pad it.", "0/0: raw"
    )

    def fail(*arguments):
        error = ContractError("no recompile: a batch\n  Pad it.", brief="no recompile: a batch", explanations=[why])
        error.add_note(f"kept in hf_{'a1B2' * 9}")
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    code, out, told = main("recipe=tiny")
    assert (code, out) == (9, "") and told.endswith("\nerror: no recompile: a batch\nkept in *** (exit code 9)\n")
    panel = section(told.partition("error: ")[0], "Why it broke")
    assert panel[1:] == [
        f"rank 0 {why.what}",
        f"line {why.line}",
        "before 2",
        "now 3",
        "remedy Pad it.",
        "dynamo 0/0: raw",
    ]
    monkeypatch.setattr(cli, "under_launcher", lambda: True)
    first, *_, last, end = main("recipe=tiny")[2].split("\n")
    assert first.startswith("━━ qlora-launcher") and last.startswith("━━ the process") and end == ""


@pytest.mark.parametrize(
    ("error", "reporter", "printed"),
    [
        (ContractError("broken"), None, "error: rank 1: broken (exit code 9)\n"),
        (DataError("0 rows"), None, ""),  # every rank finds it: local rank 0 prints it
        (DataError("0 rows"), 1, "error: 0 rows (exit code 3)\n"),  # this rank prepared the data
        (DataError("0 rows"), 0, ""),
    ],
)
def test_an_error_is_printed_once_and_by_a_rank_that_names_itself_where_it_is_its_own(
    second_of_two, main, monkeypatch, error, reporter, printed
):
    def fail(*arguments):
        error.reporter = reporter
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    assert main("recipe=tiny") == (error.code, "", printed)
