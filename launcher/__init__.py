"""Compiled QLoRA fine-tuning: recipe in, verified compiled run, reloadable adapter out.

import launcher
run = launcher.run("tiny", "train.steps=20")
run.metrics, run.generate("Define the noun heron.")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.api import events, run

__version__ = "0.1.0"
__all__ = ["events", "run"]


def __getattr__(name: str) -> Any:
    """`run` and `events` of launcher/api.py, imported when they are first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from launcher import api

    return getattr(api, name)
