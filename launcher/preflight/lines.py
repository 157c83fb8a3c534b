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

    def refuse(self, *, local_rank: int = 0, shown: bool = False) -> None:
        """Raise what failed: the one error, or one of the first's class with a line for each. `local_rank` is this
        process's: it reports what it found for itself alone. `shown`: a page has said all of it, so the error only
        names the checks."""
        if not self._errors:
            return
        error = self._errors[0]
        failed = [line for line in self.lines if not line.holds]
        if shown:
            names = ", ".join(line.name for line in failed)
            error = type(error)(f"a run needs all that is checked; {len(failed)} of {len(self.lines)} fail: {names}.")
        elif len(self._errors) > 1:
            lines = [" ".join(f"{line.name}: {line.found} {line.remedy}".split()) for line in failed]
            error = type(error)("\n".join([f"a run needs these {len(lines)} things, which fail:", *lines]))
        error.reporter = local_rank if self._own else 0  # one process of the machine prints what all find
        raise error
