"""Inputs that would be waited for, unpacked or allocated without end are refused in time; nothing of theirs is run."""

import ast
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.model.config_file import check_config_file
from launcher.model.load import load_config
from launcher.recipe.load import resolve
from launcher.recipe.locate import locate
from launcher.recipe.schema import ModelSection
from launcher.runtime import clock
from launcher.runtime.clock import Clock, process_age_s, process_started_s, seconds_since
from tests.conftest import ROOT, TINY
from tests.support.launches import MAIN
from tests.support.reading import refusal as refusal_of_data

LIMIT_S = 10  # as docs/faults.md promises


def refusal(*arguments: str) -> str:
    """The message that a command line ends with, in time."""
    start = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        resolve(arguments)
    assert time.monotonic() - start < LIMIT_S and caught.value.code == 2
    message = str(caught.value)
    assert len(message.splitlines()) <= 5 and len(message) < 2000
    return message


def launched(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command line that is refused before torch is imported. Ended if it takes three times as long as it may."""
    command = [sys.executable, MAIN, "recipe=tiny", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf"), **variables}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3 * LIMIT_S, check=False
    )


def serve(drip: bytes) -> Iterator[str]:
    """The address of a server that answers each request with `drip`, a byte a second, for ever."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):  # until the client has gone
            connection.recv(65536)
            while True:
                for byte in drip:
                    connection.sendall(bytes([byte]))
                    time.sleep(1)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


@pytest.fixture
def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def dripping() -> Iterator[str]:
    yield from serve(b"HTTP/1.1 200 OK\r\nX-Padding: 0123456789\r\n")


def test_fault_08_a_hub_out_of_reach_is_named_in_time_with_the_offline_way(tmp_path, closed_port):
    start = time.monotonic()
    done = launched(tmp_path, "model.name=owner/name", HF_ENDPOINT=closed_port)
    assert time.monotonic() - start < LIMIT_S
    assert done.returncode == 2, done.stderr
    assert "model 'owner/name' is not in the local cache" in done.stderr
    assert "Offline: copy the checkpoint here and set model.name=/path/to/folder" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_fault_51_a_server_that_drips_is_not_waited_for(tmp_path, dripping):
    start = time.monotonic()
    done = launched(tmp_path, "model.name=owner/name", HF_ENDPOINT=dripping)
    assert time.monotonic() - start < 2 * LIMIT_S, "with what a busy machine needs to start a process"
    assert done.returncode == 2, done.stderr
    assert "could not be had from the hub: no answer within 7 s" in done.stderr


def test_fault_09_a_model_that_wants_code_of_its_own_is_refused_and_nothing_is_imported(tmp_path):
    marker = tmp_path / "imported"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}))
    (tmp_path / "mine.py").write_text(f"open({str(marker)!r}, 'w')\n")
    model = ModelSection(name=str(tmp_path))
    with pytest.raises(RecipeError, match="without remote code") as caught:
        load_config(locate(model, tmp_path), model)
    assert caught.value.code == 2 and not marker.exists()


@pytest.fixture
def own(tmp_path) -> Path:
    return tmp_path / "mine.yaml"


@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "/dev/tty", "folder"])
def test_fault_51_a_recipe_that_is_no_file_is_refused(own, target):
    if target == "pipe":
        os.mkfifo(own)
    elif target == "folder":
        own.mkdir()
    else:
        own.symlink_to(target)
    assert "a recipe is a file; this is none" in refusal(f"recipe={own}")


@pytest.mark.parametrize("number", [30_000, 200_000])
def test_fault_51_thousands_of_unknown_keys_are_counted_and_the_first_named(own, number):
    own.write_text("".join(f"key_{n}: {n}\n" for n in range(number)))
    message = refusal(f"recipe={own}")
    if number == 30_000:
        assert "unknown key key_0" in message and "29,997 more, in key_3, key_4" in message and "key_22, ..." in message
    else:
        assert "at most 524,288 bytes; got 3,577,780 and begins 'key_0: 0'" in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("train:\n" + "".join(f"  k{n}: 1\n" for n in range(30_000)), "more, in train.k3"),
        ("data:\n  sources:\n" + "    - {pth: a}\n" * 10_000, "more, in data.sources[2].path"),
        ("train: {steps: " + "a" * 500_000 + "}\n", "train.steps must be a whole number"),
        ("[" * 200_000, "nested too deeply"),
        ("a" * 2**21, "at most 524,288 bytes"),
    ],
)
def test_fault_51_a_recipe_of_any_other_absurd_kind_is_refused(own, content, says):
    own.write_text(content)
    assert says in refusal(f"recipe={own}")


@pytest.mark.parametrize("word", ["word{}=1", "word{}"])
def test_fault_51_a_command_line_of_thousands_of_words_is_refused(word):
    assert "99,996 more, in word4, word5" in refusal("recipe=tiny", *map(word.format, range(100_000)))


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "/dev/null"])
def test_fault_51_a_data_file_that_is_no_file_is_refused(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    if name == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(name)
    assert "Found: no regular file" in refusal_of_data(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_fault_51_a_model_folder_with_a_pipe_is_refused(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(RecipeError, match="a model folder must hold"):
        locate(ModelSection(name=str(tmp_path)), tmp_path)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers must be a whole number from 1 to 1,000"),
        ({"num_attention_heads": 10**9, "num_key_value_heads": 10**9}, "num_attention_heads must be"),
        ({"vocab_size": 10**9}, "vocab_size must be"),
        ({"hidden_size": 2**24, "intermediate_size": 2**24}, "a model has at most 2,000,000,000,000 weights"),
        ({"head_dim": 2**16, "num_attention_heads": 2**16}, "a model has at most"),
        ({"num_hidden_layers": 1000, "hidden_size": 2**16, "intermediate_size": 2**18}, "a model has at most"),
        ({"padding": "x" * 2**24}, "16,7.* bytes"),
    ],
)
def test_fault_51_absurd_sizes_in_config_json_are_refused_before_anything_is_allocated(tmp_path, sizes, says):
    config = json.loads((TINY / "base" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    with pytest.raises(RecipeError, match=says):
        check_config_file(tmp_path / "config.json", max_length=256)


def test_fault_52_ages_are_differences_of_one_clock_which_is_not_the_time_of_day(monkeypatch):
    started_s = process_started_s()
    monkeypatch.setattr(clock, "boot_clock_s", lambda: started_s + 7.5)
    monkeypatch.setattr(clock.time, "time", lambda: 0.0)
    assert process_age_s() == Clock().elapsed_s["imports"] == seconds_since()() == pytest.approx(7.5)
    assert Clock(started_s + 5).elapsed_s["imports"] == seconds_since(started_s + 5)() == pytest.approx(2.5)


OF_THE_DAY = {"time", "time_ns", "now", "utcnow", "today"}  # of time and datetime
# Compare with dates of files, to remove those of another day; tell a tracker when a figure was logged.
FILE_DATES = {"data/cache.py", "runtime/first_rank.py", "report/tracking_tools.py"}


def uses_of_the_time_of_day(folder: Path) -> set[str]:
    """Modules that ask for the time of day, by path."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in OF_THE_DAY and isinstance(node.value, ast.Name):
                if node.value.id in ("time", "datetime", "date"):
                    found.add(path.relative_to(folder).as_posix())
            elif isinstance(node, ast.ImportFrom) and node.module == "time":
                found.update(path.relative_to(folder).as_posix() for name in node.names if name.name in OF_THE_DAY)
    return found


def test_fault_52_no_figure_is_a_difference_of_times_of_day(tmp_path):
    assert uses_of_the_time_of_day(ROOT / "launcher") == FILE_DATES
    (tmp_path / "a.py").write_text("import time\nstart = time.time()\n")
    (tmp_path / "b.py").write_text("from time import time\n")
    assert uses_of_the_time_of_day(tmp_path) == {"a.py", "b.py"}
