"""mode=push through the real client of huggingface_hub, to a hub on this machine: what arrives, and what never does."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from filelock import FileLock
from huggingface_hub import constants

from launcher import credentials
from launcher.checkpoint.files import write_json
from launcher.credentials import masked
from tests.conftest import ROOT
from tests.export.conftest import Main, Outcome
from tests.support.finished_runs import EXPORTED, FAILED, finished_run
from tests.support.hub_server import HubServer, Repository, hub_server
from tests.support.launches import ALONE, MAIN, finished

TOKEN = "planted-canary-of-no-issuers-form"  # known as a credential by nothing but where it stands
NEVER = {"optimizer.pt", "metrics.jsonl", "run.lock", "report.json.1.part", "checkpoints/step-8/state.json", "LICENSE"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub whose token is in the login file; Xet's package is installed, and no variable switches it off."""
    login = tmp_path / "home" / "token"
    login.parent.mkdir()
    login.write_text(TOKEN)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_DISABLE_XET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(credentials, "_REMEMBERED", set())
    with hub_server(TOKEN) as server:
        for name, value in {"ENDPOINT": server.url, "HF_TOKEN_PATH": str(login), "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finished_run(tmp_path / "run")


@pytest.fixture
def push(main: Main, run: Path) -> Main:
    """mode=push of that run."""
    return lambda *more: main("mode=push", f"run={run}", "to=me/own", "report=report.json", *more)


def on_disk(folder: Path, names: Any) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def told(done: Outcome) -> str:
    """All that it printed, its lines joined as a page may have wrapped them."""
    return " ".join((done.out + done.err).replace("│", " ").split())


def test_what_arrives_is_what_is_on_disk_private_with_its_card_and_nothing_else(
    hub: HubServer, run: Path, push: Main
) -> None:
    done = push()
    assert done.code == 0, done.err
    there = hub.repositories["me/own"]
    sent = {name: there.files[name] for name in there.files if name != ".gitattributes"}
    assert sent == on_disk(run / "adapter", sent) and {"README.md", "adapter_model.safetensors"} < set(sent)
    assert done.report["files"] == {name: len(content) for name, content in sent.items()}
    assert set(done.report["left_out"]) == NEVER and all(name in told(done) for name in NEVER)
    assert there.private and len(there.commits) == 1 and "qlora-launcher" in there.tags, "the placeholder was replaced"
    assert done.report["commit"] in told(done) and done.report["url"] == f"{hub.url}/me/own" and hub.url in told(done)
    assert any("/lfs/" in path for path in hub.paths()) and not any("xet" in path for path in hub.paths())


def test_the_token_is_sent_to_the_hub_and_stands_nowhere_else(
    hub: HubServer, push: Main, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "adapter" / "README.md").unlink()
    done = push()
    api = [headers for _, path, headers in hub.requests if "/api/" in path]
    assert len(api) >= 5 and all(headers["authorization"] == f"Bearer {TOKEN}" for headers in api)
    uploads = [headers for method, _, headers in hub.requests if method == "PUT"]
    assert uploads and all("authorization" not in headers for headers in uploads), "storage is not the hub"
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "home"]
    assert files and not [path for path in files if TOKEN.encode() in path.read_bytes()]
    hub.refusals["/preupload/"] = (500, f"a server that repeats {TOKEN}")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    failed = push()
    assert failed.code == 2 and "that repeats ***" in failed.err and TOKEN not in done.out + done.err + failed.out
    assert masked(f"x{TOKEN}y") == "x***y"


def test_a_second_push_is_another_commit_and_uploads_nothing_that_is_there(
    hub: HubServer, run: Path, push: Main
) -> None:
    push()
    card = run / "adapter" / "README.md"
    card.write_text(card.read_text() + "\nWritten by hand.\n")
    hub.repositories["me/own"].files["notes.txt"] = b"of the web page"
    hub.requests.clear()
    done = push()
    assert done.code == 0 and not any(path.startswith("PUT") for path in hub.paths())
    assert hub.repositories["me/own"].files["README.md"].endswith(b"Written by hand.\n")
    assert "keeps from before: notes.txt" in told(done)


def test_public_is_what_is_asked_for_and_a_repository_of_the_other_kind_is_refused(hub: HubServer, push: Main) -> None:
    done = push("private=false")
    assert done.code == 0 and not hub.repositories["me/own"].private and "everyone can read it" in told(done)
    hub.requests.clear()
    done = push()
    assert done.code == 2 and "is public. Give private=false" in told(done)
    assert not any("commit" in path or "preupload" in path for path in hub.paths())


def test_another_models_repository_is_left_alone_and_an_empty_one_is_taken(hub: HubServer, push: Main) -> None:
    hub.repositories["me/own"] = Repository(True, {"model.safetensors": b"theirs"}, [], ("gpt2",))
    done = push()
    assert done.code == 2 and "holds another model (1 files)" in done.err
    assert hub.repositories["me/own"].files == {"model.safetensors": b"theirs"}
    hub.repositories["me/own"] = Repository(True, {".gitattributes": b""})
    assert push().code == 0


@pytest.mark.parametrize(
    ("part", "status", "says"),
    [
        ("whoami", 401, "the hub must know the token; it does not (401)"),
        ("repos/create", 403, "the token must be allowed to write to me/own; it is not (403)"),
        ("preupload", 403, "the token must be allowed to write to me/own; it is not (403)"),
        ("validate-yaml", 400, "the hub must accept what is pushed to me/own; it does not"),
        ("repos/create", 400, "the hub must accept what is pushed to me/own; it does not"),
        ("commit", 500, "Run the same command again: it commits all files at once, and until then none."),
    ],
)
def test_each_refusal_is_told_with_its_remedy_and_nothing_is_committed(
    hub: HubServer, push: Main, part: str, status: int, says: str
) -> None:
    hub.refusals[part] = (status, "for this reason")
    done = push()
    assert done.code == 2 and says in told(done) and "Traceback" not in done.err and len(done.err.splitlines()) <= 5
    assert not done.report and not [r for r in hub.repositories.values() if r.commits]


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_token_that_may_write_to_this_repository_alone_is_enough(hub: HubServer, push: Main, status: int) -> None:
    hub.refusals["repos/create"] = (status, "this token makes no repositories")
    assert push().code == 2 and not hub.repositories
    hub.repositories["me/own"] = Repository(True, {".gitattributes": b""})
    assert push().code == 0 and hub.repositories["me/own"].commits
    assert "is private. Give private=true" in told(push("private=false"))


def test_a_connection_that_breaks_midway_commits_nothing_and_the_same_command_ends_it(
    hub: HubServer, push: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the client tries five times more
    hub.breaks = "/upload/"
    done = push()
    assert done.code == 2 and "a push must come to its end" in done.err and "Run the same command again" in done.err
    assert len([path for path in hub.paths() if path.startswith("PUT")]) > 1
    assert hub.repositories["me/own"].commits == [] and list(hub.repositories["me/own"].files) == [".gitattributes"]
    hub.breaks = ""
    assert push().code == 0 and len(hub.repositories["me/own"].commits) == 1


def test_no_token_no_network_and_no_hub_are_told_apart(
    hub: HubServer, push: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(constants, "HF_TOKEN_PATH", "/no/where/token")
        assert "there is none in HF_TOKEN, nor in the login file /no/where/token" in told(push())
    with monkeypatch.context() as patched:
        patched.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE says that there is none. Unset it." in told(push())
    with monkeypatch.context() as patched:
        patched.setattr(constants, "ENDPOINT", "http://me:canary-pass@127.0.0.1:9")
        done = push()
        assert done.code == 2 and "that to http://***@127.0.0.1:9 did not" in told(done)
    assert hub.requests == []


def test_what_is_not_proven_is_refused_or_pushed_with_a_card_that_says_so(
    hub: HubServer, main: Main, tmp_path: Path
) -> None:
    run = finished_run(tmp_path / "failed", FAILED)
    push: Callable[..., Outcome] = lambda *more: main("mode=push", f"run={run}", "to=me/own", *more)  # noqa: E731
    done = push()
    assert done.code == 2 and "this does not hold: training lowered the loss" in told(done) and hub.requests == []
    card = run / "adapter" / "README.md"
    whole = card.read_text()
    card.write_text(whole.replace("- unproven\n", ""))
    assert "must have the tags qlora-launcher, unproven" in told(push("unproven=true")) and hub.requests == []
    card.write_text(whole)
    done = push("unproven=true")
    assert done.code == 0 and "unproven; the card says so" in told(done)
    assert "unproven" in hub.repositories["me/own"].tags
    (run / "adapter").rename(tmp_path / "out.unproven")
    done = main("mode=push", "run=out.unproven", "to=me/own", "unproven=true")
    assert done.code == 2 and "no proven model is not pushed" in told(done)


def test_an_exported_folder_is_pushed_with_its_card_and_one_without_is_refused(
    hub: HubServer, main: Main, run: Path, push: Main
) -> None:
    push()
    out = run / "out"  # an export may lie anywhere, in its run's folder too
    (run / "adapter").rename(out)
    (out / "adapter_model.safetensors").rename(out / "model-00001-of-00001.safetensors")
    write_json(out / "report.json", EXPORTED.as_report())  # the report= of its export
    done = main("mode=push", f"run={out}", "to=me/out", "report=report.json")
    assert done.code == 0 and "model-00001-of-00001.safetensors" in done.report["files"]
    (out / "README.md").write_text("# a card of another's")
    done = main("mode=push", f"run={out}", "to=me/out")
    assert done.code == 2 and "run must be the folder of a run" in told(done)


def test_no_file_of_a_folder_within_is_pushed_but_for_chat_templates(hub: HubServer, run: Path, push: Main) -> None:
    within = ["q4.unproven/q4-q4_k_m.gguf", "LICENSES/id_rsa", "additional_chat_templates/old/tool.jinja"]
    for name in (*within, "additional_chat_templates/tool.jinja", "LICENSE.txt"):
        (run / "adapter" / name).parent.mkdir(parents=True, exist_ok=True)
        (run / "adapter" / name).write_text("content")
    done = push()
    assert done.code == 0 and set(within) <= set(done.report["left_out"])
    assert {"additional_chat_templates/tool.jinja", "LICENSE.txt"} < set(hub.repositories["me/own"].files)


def test_a_run_that_goes_on_a_checkpoint_and_an_unproven_adapter_are_refused(
    hub: HubServer, run: Path, push: Main
) -> None:
    with FileLock(run / "run.lock"):
        assert "must not be in use" in told(push())
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps({**report, "adapter": None}))
    assert "what is pushed must be proven; the adapter of" in told(push("unproven=true"))
    assert hub.requests == []


@pytest.mark.parametrize("to", ["own", "a/b/c", "me/-own", "me/own.git", "me/ö", "https://hub/me/own", "me/"])
def test_a_repository_is_owner_and_name(push: Main, to: str, main: Main, run: Path) -> None:
    done = main("mode=push", f"run={run}", f"to={to}")
    assert done.code == 2 and "to must be owner/name" in done.err and to in done.err


def test_no_option_takes_a_token(main: Main, run: Path) -> None:
    done = main("mode=push", f"run={run}", "to=me/own", "token=canary-of-the-line")
    assert done.code == 2 and "mode=push has no key token" in done.err and "canary" not in done.err


def test_xet_stays_on_for_who_says_so(hub: HubServer, push: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "0")
    asked: list[bool] = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_commit", lambda *_, **__: asked.append(constants.HF_HUB_DISABLE_XET) or 1 / 0
    )
    push()
    assert asked == [False]


def test_a_card_written_by_hand_is_not_replaced(hub: HubServer, run: Path, push: Main) -> None:
    card = run / "adapter" / "README.md"
    card.write_text("---\ntags: [mine\n---\nBy hand.")
    done = push()
    assert done.code == 2 and "has none that can be read" in told(done) and card.read_text().endswith("By hand.")


def test_an_interrupted_push_says_what_is_left_of_it(
    hub: HubServer, push: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", interrupted)
    done = push()
    assert done.code == 130 and "all of it is committed, or nothing: run it again" in told(done)


@pytest.mark.slow
def test_a_whole_process_pushes_to_hf_endpoint_with_the_token_of_the_environment(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    with hub_server("hf_" + "CanaryAb12" * 3) as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0", "HF_DEBUG": "1"}
        words = ("mode=push", f"run={run}", "to=me/own", "report=report.json")
        done = finished(*ALONE, MAIN, *words, cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr[-2000:]
    sent = hub.repositories["me/own"].files
    assert on_disk(run / "adapter", set(sent) - {".gitattributes"}).items() <= sent.items()
    texts = [
        done.stdout,
        done.stderr,
        *(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()),
    ]
    assert not [text for text in texts if hub.token in text] and "POST /api/repos/create" in hub.paths()
    imports = "import launcher.commands.push, sys; sys.exit('torch' in sys.modules)"
    assert finished(sys.executable, "-c", imports, cwd=ROOT).returncode == 0, "none is needed, and it takes seconds"
