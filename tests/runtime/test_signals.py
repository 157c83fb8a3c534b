"""A signal ends the run: at once, or at the end of the step where the training loop defers it."""

import os
import signal
from contextlib import suppress

import pytest

from launcher.runtime.signals import Terminated, deferring, listen, stop_vote, voted_stop

KINDS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]


@pytest.fixture(autouse=True)
def handlers():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    listen()
    yield
    listen()  # forgets what was received
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize(("signum", "kind"), KINDS)
def test_a_signal_is_raised_at_once_and_remembered_where_that_is_swallowed(signum, kind):
    assert voted_stop([stop_vote()]) is None
    with pytest.raises(kind):
        os.kill(os.getpid(), signum)
    assert voted_stop([0.0, stop_vote()]) is kind
    listen()
    assert stop_vote() == 0


@pytest.mark.parametrize(("signum", "kind"), KINDS)
def test_a_deferred_signal_is_only_remembered(signum, kind):
    with deferring():
        os.kill(os.getpid(), signum)
        assert voted_stop([stop_vote()]) is kind
    assert voted_stop([stop_vote()]) is kind


def test_a_second_interrupt_is_raised_and_a_second_sigterm_is_ignored():
    with deferring():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_votes_of_many_ranks_add_up_to_one_answer():
    os_kills = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    votes = {}
    for signum in os_kills:
        listen()
        with deferring():
            os.kill(os.getpid(), signum)
            votes[signum] = stop_vote()
    assert voted_stop([1000 * votes[signal.SIGINT]]) is KeyboardInterrupt
    assert voted_stop([999 * votes[signal.SIGINT] + votes[signal.SIGTERM]]) is Terminated


def test_an_ignored_sigint_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for a job in the background
    listen()
    with suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop_vote() == 0
