"""Workers give what one process gives, keep its errors, and end with it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from itertools import chain, count, islice

import psutil
import pytest

from launcher.data.chat import workers as workers_module
from launcher.data.chat.workers import EncoderPool, chunks
from launcher.data.documents import Document
from launcher.data.read.rows import PlainText, RowFault
from launcher.errors import DataError, LauncherError
from tests.conftest import ROOT, TINY
from tests.support.chats import chat, encoder, same

GOOD = [chat(f"user: Define {n}", f"assistant: {'word ' * (n % 7)}<|eot|>{n}") for n in range(45)]
REFUSED = chat("user: Hi", "system: late", "assistant: Hello")


@pytest.fixture(scope="module")
def pool(make_tokenizer):
    """Two workers from the first row on, with a template that refuses late system messages."""
    with (
        pytest.MonkeyPatch.context() as patch,
        closing(EncoderPool(small_encoder(make_tokenizer, patch), workers=2)) as pool,
    ):
        yield pool


def small_encoder(make_tokenizer, patch):
    patch.setattr(workers_module, "CHUNK_ROWS", 4)
    patch.setattr(workers_module, "ALONE_CHARACTERS", 0)
    return encoder(make_tokenizer("chatml"), loss_on="assistant")


def workers():
    return [psutil.Process(process.pid) for process in multiprocessing.active_children()]


def test_many_rows_come_in_order_as_one_process_encodes_them_with_faults_in_their_place(pool):
    rows = [*GOOD[:20], REFUSED, *GOOD[20:], REFUSED]
    got_rows, encoded = zip(*pool.encode(rows), strict=True)
    alone = pool.encoder.encode(rows)
    assert list(got_rows) == rows and len(workers()) == 2
    assert [item.loss_on for item in encoded] == [item.loss_on for item in alone]
    faults = [index for index, item in enumerate(encoded) if isinstance(item.document, RowFault)]
    assert faults == [20, 46]
    for index in faults:
        fault, expected = encoded[index].document, alone[index].document
        assert (str(fault), fault.reason, fault.code) == (str(expected), "template", 3)
    documents, expected = (
        [item.document for item in items if isinstance(item.document, Document)] for items in (encoded, alone)
    )
    assert same(documents, expected)


def test_an_error_about_all_rows_arrives_as_it_was_raised(pool):
    with pytest.raises(DataError, match=r"^f:1: data.loss_on=assistant needs chats") as caught:
        list(pool.encode([*GOOD, PlainText("a river", "f:1")]))
    assert type(caught.value) is DataError and caught.value.code == 3


def test_rows_are_read_ahead_by_a_few_chunks_only(pool):
    read = count()
    rows = (GOOD[next(read) % 45] for _ in range(1000))
    assert len(list(islice(pool.encode(rows), 1))) == 1
    assert next(read) <= 4 * (2 * workers_module.AHEAD + 1)


def test_an_interrupt_of_the_terminal_leaves_workers_alone_and_they_import_no_torch(pool):
    list(pool.encode(GOOD))
    for worker in workers():
        assert not any("libtorch" in mapped.path for mapped in worker.memory_maps())
        worker.send_signal(signal.SIGINT)
    assert len(list(pool.encode(GOOD))) == 45 and len(workers()) == 2


@pytest.mark.parametrize("noticed", [True, False], ids=["before rows are sent", "while results are awaited"])
def test_a_killed_worker_is_an_error_with_a_message(make_tokenizer, monkeypatch, noticed):
    others, threads = multiprocessing.active_children(), set(threading.enumerate())
    with closing(EncoderPool(small_encoder(make_tokenizer, monkeypatch), workers=2)) as pool:
        encoded = pool.encode(GOOD[n % 45] for n in range(400))
        next(encoded)
        for process in set(multiprocessing.active_children()) - set(others):
            process.kill()
        for thread in set(threading.enumerate()) - threads if noticed else ():
            thread.join(60)  # the executor's end when it has noticed
        with pytest.raises(LauncherError, match=r"must live until.*\nFound: one of them was killed"):
            list(pool.encode(GOOD) if noticed else encoded)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_reading_comes_after_all_rows_before_it(make_tokenizer, monkeypatch, workers):
    def rows():
        yield from [*GOOD[:9], REFUSED]
        raise DataError("rows.jsonl:11")

    encoded = []
    with closing(EncoderPool(small_encoder(make_tokenizer, monkeypatch), workers=workers)) as pool:
        with pytest.raises(DataError, match=r"^rows.jsonl:11$"):
            encoded.extend(pool.encode(rows()))
        with pytest.raises(DataError, match=r"^f:1: data.loss_on=assistant needs chats"):
            list(pool.encode(chain([PlainText("a river", "f:1")], rows())))
    assert len(encoded) == 10 and isinstance(encoded[9][1].document, RowFault)


@pytest.mark.parametrize(("workers", "characters"), [(1, 0), (8, 10_000)])
def test_few_rows_and_one_core_start_no_process(make_tokenizer, monkeypatch, workers, characters):
    before = len(multiprocessing.active_children())
    one = small_encoder(make_tokenizer, monkeypatch)
    monkeypatch.setattr(workers_module, "ALONE_CHARACTERS", characters)
    assert len(list(EncoderPool(one, workers=workers).encode(GOOD))) == 45
    assert len(multiprocessing.active_children()) == before


def test_chunks_hold_many_short_rows_or_few_long_ones(monkeypatch):
    monkeypatch.setattr(workers_module, "CHUNK_ROWS", 4)
    monkeypatch.setattr(workers_module, "CHUNK_CHARACTERS", 100)
    rows = [PlainText("a", "f:1")] * 9 + [chat("user: " + "b" * 60, "assistant: " + "c" * 60)] * 2
    rows += [PlainText("d" * 60, "f:2")] * 3
    assert [len(chunk) for chunk in chunks(rows)] == [4, 4, 2, 1, 2, 1]
    assert [row for chunk in chunks(iter(rows)) for row in chunk] == rows


UNGUARDED = """
import multiprocessing, os, signal
from multiprocessing.context import SpawnProcess
from transformers import AutoTokenizer
from launcher.data.chat import workers
from launcher.data.chat.encode import Encoder
from launcher.data.read.rows import PlainText
from launcher.recipe.data_section import DataSection
print("main", flush=True)
workers.ALONE_CHARACTERS = 0
pool = workers.EncoderPool(Encoder(AutoTokenizer.from_pretrained(BASE), data=DataSection()), workers=2)
START
print(len(list(pool.encode([PlainText("a river", "f")] * 2000))), flush=True)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
INTERRUPTED_START = """
start = SpawnProcess.start
def interrupted(process):
    start(process)
    raise KeyboardInterrupt
SpawnProcess.start = interrupted
"""


def run_unguarded(folder, start=""):
    """Returns when the last process that holds the output has ended; a worker that waits for ever is a timeout."""
    script = folder / "unguarded.py"
    script.write_text(UNGUARDED.replace("BASE", repr(str(TINY / "base"))).replace("START", start))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)


def test_an_interrupt_while_a_worker_is_started_ends_the_process(tmp_path):
    ended = run_unguarded(tmp_path, INTERRUPTED_START)
    assert ended.stdout == "main\n" and ended.returncode == -signal.SIGINT


def test_workers_do_not_run_the_users_script_and_end_when_it_is_killed(tmp_path):
    ended = run_unguarded(tmp_path)
    said, rows, pids = ended.stdout.splitlines()
    assert (said, rows, ended.returncode) == ("main", "2000", -signal.SIGKILL)
    assert len(pids.split()) == 2
