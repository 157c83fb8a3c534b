"""The imports of torch and transformers without what slows them down for nothing. Stdlib only.

They make some millions of objects that all stay. The garbage collector, which runs by counts of new objects, walks them
again and again: a sixth of the imports' CPU time (6.2 s with it, 5.1 without; medians of four, CPU). Afterwards they
are frozen: no later collection, among them the full one before a capture, looks at them.

Where they are installed, transformers also imports scipy, for object detection, and scikit-learn, for generation with a
draft model: 5.9 s with scipy, 5.0 without (medians of three).
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("scipy", "sklearn")  # by us; transformers takes them as not installed


@contextmanager
def quick_imports() -> Iterator[None]:
    """Around imports only: what else is made within is never collected."""
    was_on, hidden = gc.isenabled(), [name for name in UNUSED if name not in sys.modules]
    gc.collect()  # what an earlier run of this process left must not be frozen with the rest
    gc.disable()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: as if there were no such module
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)
        gc.freeze()
        if was_on:
            gc.enable()
