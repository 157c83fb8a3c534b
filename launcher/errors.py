"""Every way a run may fail, each with its exit code (docs/run-files.md). Stdlib only.

A message gives the rule, the value and the remedy, in that order; `cli` prints it without a traceback.
"""

import errno
import os
import re
from collections.abc import Sequence
from typing import Any

from launcher.credentials import masked

LESS_MEMORY = (
    "Set memory.activations=full (offload on a GPU), lower train.micro_batch (raise train.accumulation), "
    "data.max_length, memory.loss_chunk_mib or lora.r."
)
GGUF_REMEDY = "GGUF files are made for llama.cpp: name the checkpoint that they were made from."

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, a file larger than may be
DISK_FAULTS = (*FULL_DISK, errno.EIO)


def errno_of(error: BaseException) -> int | None:
    """The number of the system's error that this one is, None if it is none. safetensors and tokenizers raise errors of
    their own, with the number in their text."""
    if isinstance(error, OSError):
        return error.errno
    number = re.search(r"\(os error (\d+)\)", str(error))
    return int(number[1]) if number else None


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed for want of space. Libraries raise errors of their own, with the system's text in them."""
    return errno_of(error) in FULL_DISK or any(os.strerror(code) in str(error) for code in FULL_DISK)


# Codes of ends that may follow from another rank's: a bug's, as another rank's end may show, a lost rank's, a signal's.
LESS_TELLING = (1, 8, 129, 130, 138, 143)


SHARED_CODES = (2, 3)  # of errors that mostly every rank finds, so that one of them prints


class LauncherError(Exception):
    """A failure with a message meant for the user. `code` becomes the exit code of the process."""

    code = 1

    def __init__(self, message: str, *, step: int | None = None) -> None:
        super().__init__(masked(message))
        self.step = step  # of the optimizer, where it is not the last one recorded
        self.rank: int | None = None  # the rank to blame, where it is not the one that raises this
        self.reporter: int | None = None  # the local rank that prints it, where the others only repeat it

    def __str__(self) -> str:
        """The message, and what `add_note` has added to it, such as what became of the weights."""
        return "\n".join([super().__str__(), *getattr(self, "__notes__", ())])


class SinkError(LauncherError):
    """A sink of the caller (launcher.run) failed."""


class RecipeError(LauncherError):
    """The recipe or the command line is wrong, or names a model that is not available."""

    code = 2


class DataError(LauncherError):
    """A source cannot be read, or leaves nothing to train on."""

    code = 3


class CheckpointError(LauncherError):
    """The adapter on disk does not give back what was trained, or the run folder is in use."""

    code = 4


class FolderError(CheckpointError):
    """The run folder is gone while the run goes on, or may not be written any more."""


class NonFiniteError(LauncherError):
    """A loss or gradient is NaN or infinite; the update it belongs to was not applied."""

    code = 5


class DivergedError(LauncherError):
    """Losses or gradient norms stay far above the usual, for longer than the recipe bears."""

    code = 5


class MemoryExhausted(LauncherError):
    """The device ran out of memory."""

    code = 6


class DiskError(LauncherError):
    """The disk is full or fails: a file of the run could not be written."""

    code = 7


class LostRank(LauncherError):
    """Another rank ended first, or keeps this one waiting too long."""

    code = 8


class ContractError(LauncherError):
    """The compile contract broke: a graph break, a recompile, a limit hit, a backend error or a wrong graph count;
    or the compiled path does not compute what stock code computes (mode=parity, and mode=bench at its first step).

    `explanations` (records/explanation.py): why, which `brief`, the message for where they are shown, leaves out.
    """

    code = 9

    def __init__(self, message: str, *, brief: str = "", explanations: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.explanations, self._brief = tuple(explanations), masked(brief or message)

    @property
    def brief(self) -> str:
        """What remains to be said where the explanations are shown, with the notes that were added."""
        return "\n".join([self._brief, *getattr(self, "__notes__", ())])


def described(error: LauncherError) -> dict[str, str]:
    """What another process needs to raise the same error: the nearest class of this module, and the message."""
    nearest = next(kind for kind in type(error).__mro__ if kind.__module__ == __name__)
    return {"class": nearest.__name__, "message": str(error)}


def from_description(description: dict[str, str]) -> LauncherError:
    """The error that `described` has described."""
    error: LauncherError = globals()[description["class"]](description["message"])
    return error
