"""Why the compile contract broke, in plain words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """One graph break, recompile, limit hit or backend error. A text is "" where it is not known."""

    what: str  # what happened, the guard or dynamo's reason included
    line: str  # "FILE:LINE: SOURCE" of the user's code
    before: str  # the value that the graphs were compiled for; several are separated by commas
    now: str  # the value that did not fit
    remedy: str
    raw: str  # dynamo's own words
