"""Imports of torch and transformers with the garbage collector at rest. Stdlib only.

They make some millions of objects that all stay. The collector, which runs by counts of new objects, walks them again
and again: a sixth of the imports' CPU time (6.2 s with it, 5.1 without; medians of four, CPU). Afterwards they are
frozen: no later collection, among them the full one before a capture, looks at them.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Around imports only: what else is made within is never collected."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
