"""A main thread that is deaf to signals, and what ends its process all the same."""

import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

# read() is restarted by the kernel: the main thread does not come back to Python, as in a collective. An exception that
# is raised before is lost, as in a callback.
DEAF = """
import ctypes, os, signal, sys
from contextlib import nullcontext, suppress
from launcher.runtime.ending import last_words
from launcher.runtime.signals import deferring, own_process
from launcher.runtime.wakeup import watch_signals

own_process(), watch_signals()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.siginterrupt(number, False)
with last_words(lambda code, reason: print(code, reason, flush=True)):
    with deferring() if sys.argv[1] == "loop" else nullcontext():
        print("deaf", flush=True)
        while True:
            with suppress(BaseException):
                ctypes.CDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
"""


@pytest.fixture
def deaf(request):
    """A process whose main thread waits in C: outside the loop, or in it."""
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF, request.param], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # ignored where the tests run under nohup
    )  # fmt: skip
    assert process.stdout.readline() == "deaf\n", process.stderr.read()
    time.sleep(0.5)  # from its line to the kernel's read
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("deaf", ["outside"], indirect=True)
@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]
)
def test_fault_44_a_process_that_waits_in_c_ends_within_5_s_with_its_last_words(deaf, signum, code):
    deaf.send_signal(signum)
    out, err = deaf.communicate(timeout=5)
    assert deaf.returncode == code
    assert out.startswith(f"{code} ") and out.endswith("; nothing was saved since the last checkpoint\n")
    assert err == ""


@pytest.mark.parametrize("deaf", ["loop"], indirect=True)
def test_in_the_training_loop_a_slow_step_may_end_and_a_second_interrupt_does_not_wait_for_it(deaf):
    deaf.send_signal(signal.SIGINT)
    time.sleep(4)
    assert deaf.poll() is None
    deaf.send_signal(signal.SIGINT)
    assert deaf.wait(timeout=5) == 130


INTERRUPTED = """
import os, signal, sys, threading, time
from launcher.runtime.ending import last_words
from launcher.runtime.signals import importing, own_process

def say(code, reason):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
    print(code, reason, flush=True)

def start(self, begun=[], start=threading.Thread.start):
    if sys.argv[1:] and not begun:  # the second one comes before the thread that says them
        begun.append(True)
        os.kill(os.getpid(), signal.SIGINT)
    start(self)

threading.Thread.start = start
own_process()
with last_words(lambda code, reason: print("all of them", flush=True)), last_words(say), importing():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""


@pytest.mark.parametrize("when", [[], ["at once"]])
def test_fault_26_a_second_interrupt_while_the_last_words_are_said_takes_none_of_them(when):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *when], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    said = ["130 interrupted; nothing was saved since the last checkpoint", "all of them"]
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (130, said, "")


LATE = """
import os, signal, sys
from launcher.runtime.signals import own_process, release_process

class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        print("came", flush=True)

own_process()
late = Late()
release_process(7)
sys.exit(7)
"""


def test_fault_26_an_interrupt_while_the_interpreter_ends_leaves_the_code_as_it_is():
    done = subprocess.run([sys.executable, "-c", LATE], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (7, "came\n", "")
