"""No credential, wherever it was typed or set, is printed or written; and what only looks like one stays readable."""

import io
import json
import sys

import pytest
from rich.console import Console

from launcher import cli
from launcher.credentials import MASK, masked, masked_tree
from launcher.errors import RecipeError
from launcher.proof.bench.processes import ChildFailed, run_child
from launcher.report import Screen
from tests.conftest import ROOT
from tests.support.arguments import replaced
from tests.support.launches import ALONE, MAIN, finished
from tests.support.records import start_record

HF = "hf_" + "CanaryAb12" * 3
ISSUED = {  # by their issuers' prefixes
    "hf": HF, "openai": "sk-proj-" + "Canary12" * 4, "old openai": "sk-" + "Canary12" * 4,
    "github": "ghp_" + "Canary" * 6, "github fine": "github_pat_11CANARY0_" + "Canary12" * 4,
    "gitlab": "glpat-Canary-12_Canary12345", "aws": "AKIACANARYCANARY1234", "google": "AIza" + "Canar" * 7,
    "slack": "xoxb-1234567890-canarycanary", "wandb": "wandb_v1_" + "Canary12" * 4,
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJlY2FuYXJ5",
}  # fmt: skip
COMMIT = "0c4a41e0" * 5
SET = {  # in the environment: nothing in them shows what they are
    "WANDB_API_KEY": COMMIT, "MY_SECRET": 'quotes "and\\ canary é', "DB_PASSWORD": "correct canary battery staple",
    "SERVICE_TOKENS": "firstcanary-1,secondcanary-2", "KAGGLE_KEY": "canarykaggle",
    "AWS_SECRET_ACCESS_KEY": "cana/ry+" * 5, "HTTPS_PROXY": "http://me:canaryproxy@127.0.0.1:9",
    "HF_ENDPOINT": "http://canaryuser:canarypass-word@127.0.0.1:9",
}  # fmt: skip
PARTS = (*ISSUED.values(), *SET.values(), "firstcanary-1", "secondcanary-2", "canaryuser", "canarypass", "canaryproxy")


def forms(secret):
    """A secret as it is, and escaped as in Python and JSON."""
    return {secret, repr(secret)[1:-1], ascii(secret)[1:-1], json.dumps(secret)[1:-1]}


def leaked(text):
    """What of PARTS a text contains, in any form."""
    return [part for part in PARTS if any(form in text for form in forms(part))]


@pytest.fixture
def secrets(monkeypatch):
    for name, value in SET.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("token", ISSUED.values(), ids=list(ISSUED))
@pytest.mark.parametrize(
    "around", ["{}", "got '{}' (command line)", '{{"x": "{}"}}', "https://h/{}/x", "a,{};b", "--x={}\n"]
)
def test_fault_37_a_token_is_known_by_its_issuers_prefix_wherever_it_stands(token, around):
    text = masked(around.format(token))
    assert text == around.format(MASK) and masked(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:canary@host/x@1", "https://***@host/x@1"),
        ("https://canary@host", "https://***@host"),
        ("s3://key:cana/ry@bucket", "s3://***@bucket"),
        ("model.token='canary'", "model.token='***'"),
        ("{'api_key': 'can,ary', 'x': 1}", "{'api_key': '***', 'x': 1}"),
        ('{"password": "can\\"ary"}', '{"password": "***"}'),
        ("Authorization: Basic Y2FuYXJ5", "Authorization: Basic ***"),
        ("{'authorization': 'Bearer canary'}", "{'authorization': 'Bearer ***'}"),
        ("Bearer canarycanarycanary1", "Bearer ***"),
        ("https://h/x?X-Amz-Signature=canary&y=1", "https://h/x?X-Amz-Signature=***&y=1"),
        ("--hub_token=canary", "--hub_token=***"),
        ("https://h/x?token=5/canary", "https://h/x?token=***"), ("my_token=5/canary", "my_token=***"),
        ("the secret: C4nary", "the secret: ***"), ("secret: canary", "secret: ***"),
        ("a_secret: canary", "a_secret: ***"),
        ("the password: canary", "the password: ***"), ("token='<canary", "token='***"),
        ("token=canary/x", "token=***"),
        ("-----BEGIN RSA PRIVATE KEY-----\ncanary\n-----END RSA PRIVATE KEY-----", "***"),
    ],
)  # fmt: skip
def test_fault_37_a_value_beside_a_secrets_name_and_a_login_in_a_url_are_masked(text, expected):
    assert masked(text) == expected and masked(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        COMMIT,
        "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",  # SHA-256
        "dGhlIHF1aWNrIGJyb3duIGZveCBqdW1wcw==", "/data/hf_transformers/token/sk-learn/AKIA.jsonl", "git@github.com:a/b",
        "https://host:8080/a@b", "http://host/path@v1.2", "each token: a piece", "max_tokens=48", "sample_tokens: 4",
        "pad_token='<pad>'", "{'eos_token': '<|im_end|>'}", "tokenizer: no vector in the model for x", "sort_key=name",
        "unknown key --token; got nothing", "a bearer of news", "image_token='<image>'",
        '{"fim_token": "<fim>"}', "The secret: never give up", "bytes_per_token: 4.9",
        "/data/token=5/part.parquet", "data.sources=token=5/part.parquet", "eyJustAName.and.another",
        "12,345 tokens: 8 a step", "max_token=20", "run.sample_token=4",
    ],
)  # fmt: skip
def test_fault_37_ordinary_text_stays_readable(secrets, monkeypatch, text):
    monkeypatch.setenv("WANDB_API_KEY", "disabled-for-this-test")
    assert masked(text) == text


def test_fault_37_a_variables_value_is_masked_in_every_form_but_a_short_one_and_a_files_path(
    secrets, monkeypatch, tmp_path
):
    for value in SET.values():
        for text in (f"x{value}y", repr(value), json.dumps({"x": value}), f"{value!a}"):
            assert MASK in masked(text) and leaked(masked(text)) == []
    monkeypatch.setenv("SHORT_KEY", "loss")
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    monkeypatch.setenv("PWD", "/nowhere/canary")
    assert masked(f"loss of {tmp_path} and /nowhere/canary") == f"loss of {tmp_path} and /nowhere/canary"


def test_fault_37_records_are_masked_by_value_and_by_key_before_a_page_wraps_them(secrets):
    tree = {"token": "short", "deep": [{"password": ["a", {"b": "c"}]}, (HF, 1.0)], "pad_token": "<pad>", HF: None}
    assert masked_tree(tree) == {
        "token": MASK, "deep": [{"password": [MASK, {"b": MASK}]}, (MASK, 1.0)], "pad_token": "<pad>", MASK: None,
    }  # fmt: skip
    record = start_record(model=f"{'x' * 30} {HF}", notes=(f"a note of {SET['DB_PASSWORD']}",))
    for width in (40, 120):
        console = Console(file=io.StringIO(), width=width, force_terminal=True)
        with Screen(console, clock=lambda: 0.0) as screen:
            screen.show(record)
        text = console.file.getvalue()
        assert "Canary" not in text and "staple" not in text and MASK in text
    assert masked_tree(start_record()) is not None and masked_tree(start_record()).notes == start_record().notes


@pytest.mark.parametrize(
    "argument",
    [
        f"lerning_rate={HF}", f"{HF}=1", HF, f"--{HF}", f"recipe={HF}", f"mode={HF}", f"blocks={HF}", f"train={HF}",
        "model.token=canaryuser", "model={token: canaryuser}", "model.token=[canaryuser", "hf_token={a: [canaryuser]}",
        "data.sources=[{path: x, api_key: canaryuser}]", "model.token=a1 model.token=canaryuser", "--token=canaryuser",
        f"model.name=./{HF}", f"train.lr={HF}", "data.sources=https://canaryuser:canarypass@host/x.jsonl",
        "model.name=https://canaryuser:other@host/x",
        "model.name=https://canaryuser:canarypass@host/x",
        f"data.sources=[{{path: {'x' * 40}{COMMIT}}}, {{path: b, weight: 1}}]",
        f"train.lr={'x' * 40}{COMMIT}", f"quant.type='{SET['MY_SECRET']}", f"report=./no/{HF}",
        f"model.name={'x' * 170}{COMMIT}/x", "run.output_dir=[https://canaryuser:canarypass@host",
    ],
)  # fmt: skip
def test_fault_50_what_is_refused_is_quoted_without_its_credentials(secrets, monkeypatch, tmp_path, capsys, argument):
    monkeypatch.chdir(tmp_path)
    words = [argument] if SET["MY_SECRET"] in argument or "{" in argument else argument.split(" ")
    assert cli.main(["recipe=tiny", *words]) in (2, 3)
    out, err = capsys.readouterr()
    assert MASK in err and leaked(out + err) == []
    assert COMMIT[:8] not in err, "half of one, cut"


def test_fault_50_a_resolved_recipe_and_an_error_of_the_api_are_masked(secrets, capsys):
    assert (
        cli.main(["recipe=tiny", f"model.revision={HF}", "data.sources=https://canaryuser:canarypass@h/x", "mode=show"])
        == 0
    )
    out, err = capsys.readouterr()
    assert f"model.revision {MASK} command line" in " ".join(out.split()) and leaked(out + err) == []
    assert str(RecipeError(f"got {HF}")) == f"got {MASK}"


def test_fault_50_an_endpoint_that_does_not_answer_is_named_without_its_login(tmp_path):
    done = finished(*ALONE, MAIN, "recipe=tiny", "model.name=no/where", cwd=tmp_path, HF_HUB_OFFLINE="0", **SET)
    assert done.returncode == 2 and "could not be had from the hub" in done.stderr
    assert leaked(done.stdout + done.stderr) == []


def test_fault_37_a_traceback_a_warning_and_a_log_are_masked_in_the_whole_process(tmp_path):
    program = f"""
import logging, sys, threading, warnings
sys.path.insert(0, {str(ROOT)!r})
from launcher import cli
def fail(*_):
    logging.warning("log of %s", {HF!r})
    warnings.warn("warned of https://canaryuser:canarypass@host")
    print("printed", {SET["DB_PASSWORD"]!r}, file=sys.stderr)
    print("printed", {SET["DB_PASSWORD"]!r})
    thread = threading.Thread(target=int, args=({HF!r},))
    thread.start()
    thread.join()
    try:
        int({SET["MY_SECRET"]!r})
    except ValueError as error:
        raise RuntimeError("GET https://canaryuser:canarypass@host", {SET["WANDB_API_KEY"]!r}) from error
cli.COMMANDS["train"] = fail
sys.exit(cli.main(["recipe=tiny"]))
"""
    (tmp_path / "program.py").write_text(program)
    done = finished(
        sys.executable, "-c", "exec(compile(open('program.py').read(), 'hidden', 'exec'))", cwd=tmp_path, **SET
    )
    assert done.returncode == 1 and leaked(done.stdout + done.stderr) == []
    for part in ("printed ***", "log of ***", "https://***@host", "invalid literal for int() with base 10: '***'"):
        assert part in done.stderr
    assert "RuntimeError" in done.stderr and "Exception in thread" in done.stderr and done.stdout == "printed ***\n"


def test_fault_37_a_benchs_child_masks_its_traceback_and_its_reason(capfd):
    with pytest.raises(ChildFailed, match=r"invalid literal .*\*\*\*"):
        list(run_child(int, HF))
    err = capfd.readouterr().err
    assert "Traceback" in err and MASK in err and HF not in err


# --- a whole run

WATCH = """
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        with open(os.environ["WATCHED"], "a") as file:
            file.write(f"{event} {arguments[1:]}\\n")
sys.addaudithook(watch)
"""
RUN = (
    "run.output_dir=run",
    "report=report.json",
    "run.trackers=[tensorboard]",
    f"model.revision={HF}",
    "train.save_every=1",
)
ELSEWHERE = ("home", "temporary", "work")  # HOME, TMPDIR and the working directory


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_arguments):
    """A finished run with a secret wherever one can be set or typed: its folder, and what it printed. The hub is not
    switched off: a model and data on this machine must need none."""
    folder = tmp_path_factory.mktemp("run")
    for name in (*ELSEWHERE, "cache"):
        (folder / name).mkdir()
    (folder / "watch").mkdir()
    (folder / "watch" / "sitecustomize.py").write_text(WATCH)
    own = {
        "HOME": folder / "home", "TMPDIR": folder / "temporary", "XDG_CACHE_HOME": folder / "cache",
        "HF_HOME": folder / "cache" / "hf", "PYTHONPATH": folder / "watch", "WATCHED": folder / "watched",
        "HF_HUB_OFFLINE": "0", "TORCHINDUCTOR_CACHE_DIR": "",
    }  # fmt: skip
    variables = {name: str(value) for name, value in own.items()} | {"HF_TOKEN": HF} | SET
    arguments = replaced(
        list(small_arguments), "compile.backend=inductor", *RUN, "compile.scope=regions", "compile.regions=[mlp]"
    )
    done = finished(*ALONE, MAIN, *arguments, cwd=folder / "work", **variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder, done


@pytest.mark.faults
def test_fault_37_nothing_that_a_run_prints_or_writes_holds_a_secret(run):
    folder, done = run
    secrets = [form.encode() for part in (HF, *SET.values(), *PARTS[-5:]) for form in forms(part)]
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "watch"]
    names = {path.name for path in files}
    assert {"report.json", "status.json", "metrics.jsonl", "state.json", "adapter_config.json", "README.md"} <= names
    assert any("tfevents" in name for name in names) and len(files) > 30
    texts = {str(path): path.read_bytes() for path in files} | {"console": (done.stdout + done.stderr).encode()}
    assert [(name, secret) for name, text in texts.items() for secret in secrets if secret in text] == []
    report = json.loads((folder / "work" / "report.json").read_text())
    assert report["recipe"]["model"]["revision"] == MASK, "it was there to be seen"


@pytest.mark.faults
def test_a_run_on_this_machines_files_makes_no_connection_and_writes_only_its_folder_and_the_caches(run):
    folder, _ = run
    watched = folder / "watched"
    assert not watched.exists(), watched.read_text()
    left = {path.relative_to(folder).as_posix() for name in ELSEWHERE for path in (folder / name).rglob("*")}
    assert {path for path in left if not path.startswith("work/run")} == {"work/report.json"}
