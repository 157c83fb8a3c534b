import importlib.util
import math
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.errors import RecipeError
from launcher.records.run import EvalRecord, RunOpened, StepRecord
from launcher.report.trackers import make_trackers


def test_tensorboard_receives_every_metric_as_soon_as_it_is_shown(tmp_path):
    (tracker,) = make_trackers(["tensorboard"])
    tracker.show("loading model")
    assert list(tmp_path.iterdir()) == []
    tracker.show(RunOpened(tmp_path))
    for event in (EvalRecord(0, 3.0), StepRecord(1, 2.5, 1e-3, 0.5, 9, 9, 1.0, 1.0), EvalRecord(1, math.inf)):
        tracker.show(event)
    events = EventAccumulator(str(tmp_path / "trackers")).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {
        "eval_loss": [(0, 3.0), (1, math.inf)],
        "loss": [(1, 2.5)],
        "lr": [(1, pytest.approx(1e-3))],
        "grad_norm": [(1, 0.5)],
    }


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert make_trackers([]) == []
    with pytest.raises(RecipeError, match="tensorboard is not. pip install") as caught:
        make_trackers(["tensorboard"])
    assert caught.value.code == 2


def test_a_run_that_goes_on_shows_each_step_once(tmp_path):
    for steps_done, steps in ((0, range(1, 6)), (3, range(4, 7))):
        (tracker,) = make_trackers(["tensorboard"])
        tracker.show(RunOpened(tmp_path, step=steps_done))
        for step in steps:
            tracker.show(StepRecord(step, float(10 * steps_done + step), 1e-3, 0.5, 9, 9, 1.0, 1.0))
        time.sleep(1.1)  # the files are read in the order of their names, which hold whole seconds
    events = EventAccumulator(str(tmp_path / "trackers")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 34.0), (5, 35.0), (6, 36.0)
    ]  # fmt: skip
