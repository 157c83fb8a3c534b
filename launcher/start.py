"""Where a command begins, before anything of ours or others' is imported: what would end in a traceback of an import
becomes a message.
"""

import os
import sys
from collections.abc import Sequence


def run_command(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    if argv is None:
        start_in_utf8()
    try:
        from launcher.cli import main
    except Exception as error:  # what is wrong with a package may show as any error
        return _not_imported(error)
    try:
        return main(argv)
    except ImportError as error:
        return _not_imported(error)


def start_in_utf8() -> None:
    """Start this process again in Python's UTF-8 mode where file names are ASCII, as under an ASCII locale: the
    libraries that read models and data take no other names. What is printed keeps its encoding."""
    if sys.getfilesystemencoding() != "ascii" or os.environ.get("PYTHONUTF8") == "1":  # it was in vain, as with -I
        return
    os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts too
    os.environ.setdefault("PYTHONIOENCODING", getattr(sys.stdout, "encoding", None) or "ascii")
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _not_imported(error: Exception) -> int:
    from launcher.runtime.packages import import_failure

    if os.environ.get("LOCAL_RANK", "0") == "0":  # every rank finds it
        print(f"error: {import_failure(error)} (exit code 2)", file=sys.stderr)
    return 2
