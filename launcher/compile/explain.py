"""Explains a broken compile contract from dynamo's words: text in, record out. Without torch, so that it can read the
reasons of a past report too. Any text gets an Explanation; one that no cause fits says so.

Of a recompile dynamo says "0/1: GUARD  # SOURCE  # FILE:LINE in FUNCTION" for each graph that did not fit; of a break a
title, an explanation, hints, and the stack of the user's code.
"""

import linecache
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.compile.causes import BACKENDS, BREAKS, GUARDS, LESS_TELLING_GUARDS, LOOK_UP, UNKNOWN, Fault
from launcher.records.explanation import Explanation

PIECE = re.compile(r"(?:^|[\s-])(\d+/\d+): (.*?)(?=\s-?\s*\d+/\d+: |\Z)", re.DOTALL)
GUARD_ENDS = re.compile(r"\s{2,}#|\n|\s-?\s*User stack")
FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\s-]+\s*(?:-\s+)?((?!File "|Set TORCH)[^\n]*)')
COMMENT = re.compile(r"  # (?P<source>.*?)\s+# (?P<file>\S+):(?P<line>\d+) in ")
FUNCTION = re.compile(r"(?:Recompiling function \S+ in |^)([^\s:\"]+\.py):(\d+)")
MEMBER = re.compile(r"\._(?:modules|parameters|buffers)\['(\w+)'\]")
OPPOSITES = {"on": "off", "True": "False", "requires_grad=1": "requires_grad=0"}
OPPOSITES |= {b: a for a, b in OPPOSITES.items()}
MOST_GUARDS, LINE_LENGTH = 3, 300  # of a message
MOST_READ = 4_000  # characters of one guard, or of a break: causes are searched in them

GuardValues = Mapping[str, tuple[str, str]]  # by what a guard reads: its value before and now, "" where it is not known


@dataclass(frozen=True)
class _Match:
    cause: Fault
    groups: dict[str, str]
    text: str  # in which the user's line is looked for

    @property
    def subject(self) -> tuple[str, ...]:
        return self.cause.says, self.groups["name"], self.groups.get("index", "")


def explain(kind: str, raw: str, *, values: GuardValues | None = None, where: str = "") -> Explanation:
    """What `raw`, dynamo's words, mean; `kind` is one of observe.failure_kind.

    `values` were read while dynamo compiled; `where` is "FILE:LINE", for words that name no line.
    """
    if kind in ("recompile", "limit"):
        matches = _failed_guards(raw)
    else:
        matches = _match(BACKENDS if kind == "backend" else BREAKS, _without_hints(raw), raw)
    line = _user_line(matches[0].text if matches else raw, raw, where)
    if not matches:
        return Explanation(UNKNOWN, line, "", "", LOOK_UP, raw.strip())
    cause, groups = matches[0].cause, matches[0].groups
    read_before, read_now = (values or {}).get(groups["name"], ("", ""))
    befores = filter(None, dict.fromkeys(_figure(match.groups["before"]) for match in matches))
    before = ", ".join(befores) or read_before or cause.before
    now = _figure(groups["now"]) or read_now or cause.now
    if not now or now == before:  # it was read too late
        now = OPPOSITES.get(before, "another value" if before else "")
    shown = {**groups, "name": _pretty(groups["name"]), "before": before, "now": now}
    return Explanation(cause.means.format(**shown), line, before, now, cause.remedy, raw.strip())


def message(explanation: Explanation, *, remedy: str = "") -> str:
    """The explanation for an error, at most 7 lines, the last ones dynamo's own words."""
    values = [f"{when}: {value}" for when, value in (("before", explanation.before), ("now", explanation.now)) if value]
    guards = [f"{graph}: {guard}" for graph, guard, _ in _pieces(explanation.raw) if graph][:MOST_GUARDS]
    said = guards or [line.strip() for line in explanation.raw.splitlines() if line.strip()][:2]
    lines = [
        explanation.what,
        f"  at {explanation.line}" if explanation.line else "",
        f"  {'; '.join(values)}" if values else "",
        f"  {explanation.remedy} {remedy}".rstrip(),
        *(f"  dynamo: {line}" for line in said),
    ]
    return "\n".join(line[:LINE_LENGTH] for line in lines if line)


def names(raw: str) -> set[str]:
    """The expressions whose values the guards in dynamo's words compare: "x", "self.training", "G['FLAG']"."""
    guards = [guard for _, guard, _ in _pieces(raw) if not guard.startswith("tensor ")]  # of a tensor, its properties
    matches = [match for guard in guards for match in _match(GUARDS, guard)]
    return {match.groups["name"] for match in matches} - {""}


def changed_settings(raw: str) -> list[tuple[str, str]]:
    """torch's settings that changed, each after the id of the graph that was compiled under another one."""
    changes = re.findall(r"(\d+/\d+): GLOBAL_STATE changed: ([^\n#-]+)", raw)
    return [(graph, name) for graph, settings in changes for name in settings.split()]


def _pieces(raw: str) -> list[tuple[str, str, str]]:
    """Of each graph that did not fit: its id, the guard that failed, and all that is said of it."""
    pieces = PIECE.findall(raw) or [("", raw)]
    return [(graph, GUARD_ENDS.split(text.strip()[:MOST_READ])[0].strip(), text) for graph, text in pieces]


def _failed_guards(raw: str) -> list[_Match]:
    """The guard that most of the graphs failed on, once for each of them; one that tells more goes first."""
    matches = [match for _, guard, text in _pieces(raw) for match in _match(GUARDS, guard, text)]
    telling = [match for match in matches if not match.cause.says.startswith(LESS_TELLING_GUARDS)] or matches
    subjects = Counter(match.subject for match in telling).most_common(1)
    return [match for match in telling if match.subject == subjects[0][0]]


def _match(causes: tuple[Fault, ...], said: str, text: str = "") -> list[_Match]:
    """The first cause that fits, if any."""
    for cause in causes:
        if found := re.search(cause.says, said):
            groups = {key: value or "" for key, value in found.groupdict().items()}
            name = groups.get("name") or groups.get("name2", "")
            return [_Match(cause, {"before": "", "now": "", **groups, "name": name.strip(".` ")}, text)]
    return []


def _without_hints(raw: str) -> str:
    """Dynamo's words without its hints, which tell of others' code, and without the user's."""
    lines = raw.split("from user code:")[0].splitlines()
    return "\n".join(line for line in lines if not line.strip().startswith("Hint:"))[:MOST_READ]


def _user_line(text: str, raw: str, where: str) -> str:
    """The innermost line that is not torch's, as "FILE:LINE: SOURCE"; "" if there is none."""
    frames = FRAME.findall(text)
    if not frames and (comment := COMMENT.search(text)):
        frames = [comment.group("file", "line", "source")]
    if not frames and (function := FUNCTION.search(raw.strip()) or FUNCTION.search(where)):
        frames = [(*function.groups(), "")]
    own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    if not own:
        return where
    file, line, source = own[-1]
    return f"{file}:{line}: {source.strip() or linecache.getline(file, int(line)).strip()}".removesuffix(": ")


def _figure(text: str) -> str:
    return f"{int(text):,}" if text.isdecimal() else text.strip()


def _pretty(name: str) -> str:
    return re.sub(r"\b[LG]\['(\w+)'\]", r"\1", MEMBER.sub(r".\1", name))
