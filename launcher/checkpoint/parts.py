"""parts.json: every start of a run, those too that ended before they saved anything."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from launcher.checkpoint.files import write_text
from launcher.checkpoint.folder import RunFolder
from launcher.records.run import RunPart


def begin_part(folder: RunFolder, saved: Sequence[RunPart], *, step: int, lost_s: float) -> None:
    """Note that this process goes on after `step`. `lost_s`: seconds of the steps after it that earlier starts made.
    `saved`: the parts that the checkpoint tells, for a folder that has lost its parts.json."""
    parts = parts_of(folder) or list(saved)
    # Of a part that began after `step` nothing counts; of the last one, all until there: it saved that, or went on
    # from there.
    counted = [step if part is parts[-1] else min(part.last_step, step) for part in parts]
    parts = [replace(p, last_step=max(p.first_step - 1, n)) for p, n in zip(parts, counted, strict=True)]
    if parts:
        parts[-1] = replace(parts[-1], lost_s=parts[-1].lost_s + lost_s)
    parts.append(RunPart(platform.node(), first_step=step + 1, last_step=step))
    write_parts(folder, parts)


def write_parts(folder: RunFolder, parts: Sequence[RunPart]) -> None:
    """Write parts.json anew: at a start, and where the run has come to its end."""
    write_text(folder.parts, json.dumps([asdict(part) for part in parts], indent=1) + "\n")


def parts_of(folder: RunFolder) -> list[RunPart]:
    """The starts of the run in this folder; none where there is no such file, or where it is none of ours."""
    try:
        return [RunPart(**part) for part in json.loads(Path(folder.parts).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []
