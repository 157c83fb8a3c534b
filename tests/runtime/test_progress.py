"""Standing still is a fault in the training loop only, and not while it saves."""

from launcher.runtime.clock import Clock
from launcher.runtime.progress import PROGRESS, Progress


def test_the_loop_is_timed_but_for_its_saves_and_nothing_before_it() -> None:
    progress, seen = Progress(), []
    for name in ("load", "compile", "train", "checkpoint", "evaluate", "save"):
        with progress.phase(name):
            seen.append((name, progress.timed))
        seen.append(("then", progress.timed))
    assert seen == [
        ("load", False), ("then", False), ("compile", False), ("then", False), ("train", True), ("then", True),
        ("checkpoint", False), ("then", True), ("evaluate", True), ("then", True), ("save", False), ("then", True),
    ]  # fmt: skip


def test_a_clocks_phases_are_this_processs(monkeypatch) -> None:
    monkeypatch.setattr(PROGRESS, "timed", False)
    with Clock().phase("train"):
        assert PROGRESS.timed


def test_micro_batches_count_from_the_last_collective() -> None:
    progress = Progress()
    progress.begin_micro_batch()
    progress.enter_collective()
    progress.begin_micro_batch()
    assert (progress.collectives, progress.micro_batches) == (1, 1)
