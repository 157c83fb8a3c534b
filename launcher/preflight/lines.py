"""Checks one after another: each leaves a line, and those that fail end the run together."""

from collections.abc import Callable
from typing import TypeVar

from launcher.errors import LauncherError
from launcher.records.check import Check

T = TypeVar("T")


class Checks:
    """The lines of the checks made so far."""

    def __init__(self) -> None:
        self.lines: list[Check] = []
        self._errors: list[LauncherError] = []
        self._own = False

    def add(self, name: str, check: Callable[[], T], *, found: Callable[[T], str] = str, own: bool = False) -> T | None:
        """Make a check, which returns a value or raises a LauncherError: rule and value, and the remedy on the next
        lines. Its value; None where it failed.

        `found`: what is said of the value. `own`: other ranks of the machine may not find the same.
        """
        try:
            value = check()
        except LauncherError as error:
            rule, _, remedy = str(error).partition("\n")
            self.lines.append(Check(name, False, rule, remedy, error.code))
            self._errors.append(error)
            self._own |= own
            return None
        self.lines.append(Check(name, True, found(value)))
        return value

    def refuse(self, *, local_rank: int = 0) -> None:
        """Raise what failed: the one error, or one of the first's class with a line for each. `local_rank` is this
        process's: it reports what it found for itself alone."""
        if not self._errors:
            return
        error = self._errors[0]
        if len(self._errors) > 1:
            failed = [line for line in self.lines if not line.holds]
            lines = [" ".join(f"{line.name}: {line.found} {line.remedy}".split()) for line in failed]
            error = type(error)("\n".join([f"a run needs these {len(lines)} things, which fail:", *lines]))
        error.reporter = local_rank if self._own else 0  # one process of the machine prints what all find
        raise error
