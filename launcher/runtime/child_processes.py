"""What every child process of multiprocessing needs."""

import os
from multiprocessing.connection import wait
from multiprocessing.process import parent_process
from threading import Thread


def exit_with_parent() -> None:
    """From now on this process ends when its parent does, however that ends: a parent that is killed closes no queue,
    and its children would wait for ever."""
    Thread(target=_exit_after_parent, daemon=True).start()


def _exit_after_parent() -> None:
    parent = parent_process()
    assert parent is not None, "this runs in a child"
    wait([parent.sentinel])
    os._exit(1)
