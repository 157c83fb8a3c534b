"""Dynamo's configuration, set for every thread of the process.

Since torch 2.12 a value that is set holds in the thread that set it. Code is also compiled in others: autograd's thread
of a GPU runs Python of the backward pass, and a user may train from a thread.
"""

import threading
from typing import Any

import torch._dynamo


def set_in_all_threads(name: str, value: object) -> None:
    """Set `torch._dynamo.config.NAME` in this thread and in all others, those that start later included.

    What another thread has set for itself stays there; the launcher sets nothing in other threads.
    """
    config: Any = torch._dynamo.config
    setattr(config, name, value)
    config._config[name].default = value  # torch has no public way; a thread without a value of its own reads this
    seen: list[object] = []
    reader = threading.Thread(target=lambda: seen.append(getattr(config, name)))
    reader.start()
    reader.join()
    assert seen == [value], f"torch {torch.__version__} does not share torch._dynamo.config.{name} between threads"
