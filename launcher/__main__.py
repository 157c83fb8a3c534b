"""`python -m launcher`, and the installed command: what must happen before the imports, which take a second."""

import os
import signal
import sys

from launcher.runtime.ending import last_words
from launcher.runtime.packages import import_failure
from launcher.runtime.parent import end_with_parent
from launcher.runtime.signals import importing, own_process, release_process
from launcher.runtime.streams import prepare_standard_streams
from launcher.runtime.wakeup import watch_signals


def start() -> int:
    """Run the command line; returns the exit code."""
    start_in_utf8()
    end_with_parent(signal.SIGKILL)  # until there is something to save, which api.train knows
    prepare_standard_streams()  # the watcher's pipe must not get the number of a closed one
    own_process()
    watch_signals()
    with last_words(_print_end):
        code = _run()
    release_process(code)
    return code


def _run() -> int:
    try:
        with importing():
            from launcher.cli import main
    except Exception as error:  # what is wrong with a package may show as any error
        return _not_imported(error)
    try:
        return main()
    except ImportError as error:
        return _not_imported(error)


def _not_imported(error: Exception) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # every rank finds it
        print(f"error: {import_failure(error)} (exit code 2)", file=sys.stderr)
    return 2


def start_in_utf8() -> None:
    """Start this process again in Python's UTF-8 mode where file names are ASCII, as under an ASCII locale: the
    libraries that read models and data take no other names. What is printed keeps its encoding."""
    if sys.getfilesystemencoding() != "ascii" or os.environ.get("PYTHONUTF8") == "1":  # it was in vain, as with -I
        return
    os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts too
    os.environ.setdefault("PYTHONIOENCODING", getattr(sys.stdout, "encoding", None) or "ascii")
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _print_end(code: int, reason: str) -> None:
    rank = f"rank {os.environ.get('RANK')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    os.write(2, f"error: {rank}{reason} (exit code {code})\n".encode())


if __name__ == "__main__":
    sys.exit(start())
