"""What is set up before torch is imported. Imports no torch."""

import atexit
import gc
import logging
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError, RecipeError
from launcher.runtime.packages import import_failure
from launcher.runtime.signals import importing

# Turns that an idle OpenMP thread (GNU's) spins before it sleeps. The default spins for so long that one busy neighbour
# on a two-core machine made a step of recipe=tiny 2.9 times slower (1,441 against 490 ms); with this it is 1.5 times
# (745 ms), and the undisturbed step costs the same 488 ms.
SPIN_COUNT = "2000"
# The second advises a package whose kernel would compute in bf16 on CPUs with AVX512-BF16; model/load.py says no to it.
QUIET_LOGGERS = ("torch.distributed", "bitsandbytes.backends.cpu.ops")


def prepare_environment() -> tuple[str, ...]:
    """Make the libraries quiet and idle threads sleep. Variables that the user has set are kept. Returns notes for the
    report."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # once set, it does not warn about forks
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    return _ensure_home()


_set_later: dict[str, str] = {}  # variables that a run has set after its environment was prepared


def set_for_run(name: str, value: str) -> None:
    """Set a variable, unless the user has, at any moment of a run: `environment_put_back` takes it back."""
    if name not in os.environ:
        os.environ[name] = _set_later[name] = value


@contextmanager
def environment_put_back() -> Iterator[Callable[[], None]]:
    """Call what it gives once the environment is prepared. Afterwards the variables and warning filters that were set
    until then, those of `set_for_run` and the log levels are what they were before, unless somebody has changed them
    since. What libraries have read on import stays, and what they set themselves, as wandb names its service."""
    variables, filters = dict(os.environ), list(warnings.filters)
    levels = {logger: logger.level for logger in map(logging.getLogger, QUIET_LOGGERS)}
    changed: dict[str, str] = {}
    added: list[Any] = []
    done: list[bool] = []

    def prepared() -> None:
        done.append(True)
        changed.update({name: value for name, value in os.environ.items() if variables.get(name) != value})
        added.extend(entry for entry in warnings.filters if entry not in filters)

    try:
        yield prepared
    finally:
        if not done:  # it failed before that
            prepared()
        changed |= _set_later
        _set_later.clear()
        for name in (name for name, value in changed.items() if os.environ.get(name) == value):
            del os.environ[name]
            os.environ.update({name: variables[name]} if name in variables else {})
        warnings.filters[:] = [entry for entry in warnings.filters if entry not in added]  # type: ignore[index]
        for logger, level in levels.items():
            if logger.level == logging.ERROR:
                logger.setLevel(level)


def _ensure_home() -> tuple[str, ...]:
    """Give a user without a home folder (no HOME, no entry in passwd) a temporary one, which goes with the process: the
    libraries would write into a folder named ~ in the current one, or fail."""
    try:
        Path.home()
        return ()
    except RuntimeError:
        os.environ["HOME"] = home = tempfile.mkdtemp(prefix="qlora-launcher-home-")
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        return ("HOME is not set and this user has no home folder: nothing is cached for the next run",)


def check_current_folder() -> None:
    """Raise RecipeError if the current folder is gone: relative paths start there."""
    try:
        os.getcwd()
    except OSError as error:
        raise RecipeError(
            f"the current folder must exist; it was removed or is not readable ({error.strerror}). Change to another."
        ) from None


@contextmanager
def quick_imports() -> Iterator[None]:
    """Around the imports of torch and transformers: the garbage collector pauses, and what was imported is frozen.

    These imports make millions of objects that all stay. The collector would walk them again and again, a sixth of the
    imports' CPU time (6.2 s with it, 5.1 without; medians of four, CPU). Frozen, they are skipped by every later
    collection, such as the full one before a capture. Whatever exists then is frozen too, and is not freed if it
    becomes part of a cycle: call this before anything large is made. Nothing is frozen where torch has been imported. A
    signal ends the process, or comes after the imports.

    Raises RecipeError naming the package where an import fails.
    """
    if "torch" in sys.modules:
        with importing(), _named_failures():
            yield
        return
    was_enabled = gc.isenabled()
    gc.collect()  # garbage of before must not be frozen
    gc.disable()
    try:
        with importing(), _named_failures():
            yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def _named_failures() -> Iterator[None]:
    """An import that fails is an error of the installation, whatever the package raises: ImportError for a missing
    part, OSError for a library that does not load, others for versions that do not fit together."""
    try:
        yield
    except LauncherError:
        raise
    except Exception as error:
        innermost = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
        if innermost.partition(".")[0] == "launcher" and not isinstance(error, ImportError):
            raise
        raise RecipeError(import_failure(error)) from error
