"""A signal ends the run: at once, after the imports, or at the end of the step where the training loop defers it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest

from launcher.runtime import signals
from launcher.runtime.signals import HungUp, Preempted, Terminated, deferring, importing, listen, listening, stop_vote
from launcher.runtime.signals import stop_code_and_reason as code_and_reason
from tests.conftest import ROOT

KINDS = [
    (signal.SIGINT, KeyboardInterrupt, 130, "interrupted"),
    (signal.SIGTERM, Terminated, 143, "terminated"),
    (signal.SIGHUP, HungUp, 129, "hung up"),
    (signal.SIGUSR1, Preempted, 138, "preempted"),
]


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(signals, "gather", lambda value: [None, value])
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with listening():
        yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGHUP, before[1])


@pytest.mark.parametrize(("signum", "kind", "code", "word"), KINDS)
def test_a_signal_is_raised_at_once_and_remembered_where_that_is_swallowed(
    signum: int, kind: type[BaseException], code: int, word: str
) -> None:
    assert signals.voted_stop([stop_vote()]) is None
    with pytest.raises(kind):
        os.kill(os.getpid(), signum)
    assert signals.voted_stop([0.0, stop_vote()]) is kind
    assert code_and_reason(kind, "step 3 is saved") == (code, f"{word}; step 3 is saved")
    listen()
    assert stop_vote() == 0


@pytest.mark.parametrize(("signum", "kind"), [kind[:2] for kind in KINDS])
def test_a_deferred_signal_is_only_remembered(signum: int, kind: type[BaseException]) -> None:
    with deferring():
        os.kill(os.getpid(), signum)
        assert signals.received_stop() is kind
    assert signals.voted_stop([stop_vote()]) is kind


@pytest.mark.parametrize("first", [kind[0] for kind in KINDS])
def test_a_second_interrupt_is_raised_and_no_other_second_signal_is(first: int) -> None:
    with deferring():
        for signum in (first, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(os.getpid(), signum)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_where_ranks_received_different_signals_all_end_by_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for ranks in ([KeyboardInterrupt, None, Terminated], [Terminated, KeyboardInterrupt, None]):
        monkeypatch.setattr(signals, "gather", lambda _, ranks=ranks: ranks)
        assert signals.voted_stop([0.0, 2.0]) is Terminated


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_of_the_terminal_stays_ignored(signum: int) -> None:
    signal.signal(signum, signal.SIG_IGN)  # as a shell does for a job in the background, and nohup
    listen()
    with suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signum)
    assert stop_vote() == 0


def test_in_a_borrowed_process_a_signal_during_imports_is_raised_after_them() -> None:
    imported = []
    with pytest.raises(Terminated), importing():
        os.kill(os.getpid(), signal.SIGTERM)
        imported.append("all")
    assert imported == ["all"]


def test_a_process_that_was_forked_from_an_owned_one_ends_like_any_other() -> None:
    """It neither speaks for the run nor wakes the parent's watcher."""
    code = (
        "import os, signal, time\n"
        "from launcher.runtime.ending import last_words\n"
        "from launcher.runtime.signals import own_process\n"
        "from launcher.runtime.wakeup import watch_signals\n"
        "own_process(), watch_signals()\n"
        "with last_words(lambda code, reason: print(reason, flush=True)):\n"
        "    child = os.fork() or time.sleep(600)\n"
        "    time.sleep(0.5)\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM\n"
        "    time.sleep(4)\n"
        "print('the parent lives')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "the parent lives\n"), done.stderr
