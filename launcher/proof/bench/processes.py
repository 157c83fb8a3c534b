"""Each part of the measurement runs in a process of its own, so that start-up, peaks and caches are not shared.

A fresh interpreter (multiprocessing's spawn) that imports everything itself; this module imports no torch, and its
parent never does. A child sends what its task yields, then one of: done, an error meant for the user, a crash. It ends
when its parent does, however that ends.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess, parent_process
from typing import Any

from launcher.errors import LauncherError
from launcher.train.request import Request

END_S = 30.0  # that a child may take to end after its last word


class ChildFailed(LauncherError):
    """A child ended without a result, and not by an error meant for the user."""


def run_child(task: Callable[[Request], Iterator[Any]], request: Request) -> Iterator[Any]:
    """What `task(request)` yields in a process of its own. `task` is a function of a module that imports no torch.

    Raises the LauncherError that the task raises, and ChildFailed for any other end.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task, request, sender))
    process.start()
    sender.close()  # the child's is the only one left: its end is the end of the pipe
    try:
        yield from _received(receiver, process)
        process.join(END_S)
    finally:
        process.kill()  # where it is still there: after an error or an interrupt here
        process.join()
        receiver.close()


def _received(receiver: Connection, process: BaseProcess) -> Iterator[Any]:
    while True:
        try:
            kind, value = receiver.recv()
        except EOFError:
            process.join(END_S)
            raise ChildFailed(_last_word(process.exitcode)) from None
        if kind == "done":
            return
        if kind == "error":
            raise value
        if kind == "crash":
            raise ChildFailed(f"its process failed: {value}")
        yield value


def _last_word(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        why = ", as a machine that runs out of memory does" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{why}"
    return f"its process ended without a result, with code {code}"


def _child(task: Callable[[Request], Iterator[Any]], request: Request, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts parent and child: the parent ends both
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for value in task(request):
            sender.send(("value", value))
        sender.send(("done", None))
    except LauncherError as error:
        sender.send(("error", error))
    except Exception as error:
        traceback.print_exc()
        sender.send(("crash", f"{type(error).__name__}: {error}"[:500]))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "this runs in a child"
    parent.join()
    os._exit(1)
