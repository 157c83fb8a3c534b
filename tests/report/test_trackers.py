"""Trackers as a sink: what waits is handed over together; a tool that fails or hangs is switched off and said once."""

import importlib.util
import threading
import time

import pytest

from launcher.errors import RecipeError
from launcher.records.run import EvalRecord, Note, RunOpened
from launcher.report import trackers as report_trackers
from launcher.report.trackers import make_trackers
from launcher.report.tracking_tools import TOOLS, TrackingTool
from tests.support.records import run_record, step_record

SECRET = "hf_" + "a1B2" * 9


class Told(TrackingTool):
    """A tool that keeps what it is told, and fails or waits at one method."""

    calls: list[tuple[str, object]]
    fails_at = waits_at = ""
    gate: threading.Event

    def _take(self, name, what=None):
        self.calls.append((name, what))
        if name == self.fails_at:
            raise OSError(f"no way to host; token={SECRET}\nsecond line")
        if name == self.waits_at:
            self.gate.wait(20)

    def start(self, config, *, step):
        self._take("start", (dict(config), step))

    def log(self, rows):
        self._take("log", [(step, figures.get("loss", figures.get("eval_loss"))) for step, figures in rows])

    def table(self, name, rows, *, step):
        self._take(f"table {name}", step)

    def summary(self, values, *, step):
        self._take("summary", step)

    def finish(self, status, code, *, step):
        self._take("finish", (status, code, step))


@pytest.fixture
def tool(monkeypatch):
    """The class that stands for tensorboard."""
    kind = type("Fresh", (Told,), {"calls": [], "gate": threading.Event()})
    monkeypatch.setitem(TOOLS, "tensorboard", kind)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    yield kind
    kind.gate.set()


def shown(trackers, *events):
    """What the other sinks see while the trackers are shown these events."""
    seen = []
    for event in trackers.noting(events):
        trackers.show(event)
        seen.append(event)
        time.sleep(0.02)  # a tool's thread is quick
    return seen


def test_the_tool_is_told_all_in_order_and_its_end(tool, tmp_path):
    trackers = make_trackers(["tensorboard"], {"train": {"lr": 0.1}})
    shown(trackers, "loading model")
    assert not any(tmp_path.iterdir()), "nothing is written before the run has its folder"
    shown(trackers, RunOpened(tmp_path), EvalRecord(0, 3.0), step_record(1, loss=2.0), run_record())
    assert trackers.close() == () == trackers.close()
    assert [call for call, _ in tool.calls if call != "log"] == [
        "start", "summary", "table verdicts", "table sample", "finish",
    ]  # fmt: skip
    assert tool.calls[0][1] == ({"train.lr": 0.1}, 0) and tool.calls[-1][1] == ("finished", 0, 1)
    assert [row for call, rows in tool.calls if call == "log" for row in rows] == [(0, 3.0), (1, 2.0)]


def test_what_waited_while_a_tool_was_slow_is_handed_over_in_one_call(tool, tmp_path):
    tool.waits_at = "start"
    trackers = make_trackers(["tensorboard"], {})
    began_s = time.monotonic()
    shown(trackers, RunOpened(tmp_path), *(step_record(n, loss=float(n)) for n in range(1, 6)))
    assert time.monotonic() - began_s < 5, "training does not wait"
    tool.gate.set()
    trackers.close()
    assert ("log", [(n, float(n)) for n in range(1, 6)]) in tool.calls


@pytest.mark.parametrize("where", ["start", "log", "summary", "finish"])
def test_a_tool_that_fails_is_switched_off_and_said_once(tool, tmp_path, where):
    tool.fails_at = where
    trackers = make_trackers(["tensorboard"], {})
    events = [RunOpened(tmp_path), step_record(1), step_record(2), run_record(notes=("own",))]
    seen = shown(trackers, *events)
    late = trackers.close()
    notes = [event.text for event in seen if isinstance(event, Note)] + [*late]
    assert notes == [
        "tracker tensorboard was switched off: OSError: no way to host; token=***. metrics.jsonl and report.json have "
        "all figures."
    ]
    record = seen[-1]
    assert record.notes + late == ("own", *notes), "the report has it too"
    assert [call for call, _ in tool.calls][-1] == where, "it is not called again"


def test_a_tool_that_hangs_ends_neither_the_run_nor_its_close(tool, tmp_path, monkeypatch):
    tool.waits_at = "log"
    monkeypatch.setattr(report_trackers, "CLOSE_S", 0.2)
    trackers = make_trackers(["tensorboard"], {})
    assert not any(isinstance(event, Note) for event in shown(trackers, RunOpened(tmp_path), step_record(1)))
    began_s = time.monotonic()
    (note,) = trackers.close()
    assert time.monotonic() - began_s < 2 and "took longer than 0 s to finish" in note


def test_a_call_that_does_not_come_back_is_said_while_the_run_goes_on(tool, tmp_path, monkeypatch):
    tool.waits_at = "log"
    monkeypatch.setattr(report_trackers, "STALL_S", 0.05)
    trackers = make_trackers(["tensorboard"], {})
    seen = shown(trackers, RunOpened(tmp_path), *(step_record(n) for n in range(1, 12)), run_record())
    (note,) = [event.text for event in seen if isinstance(event, Note)]
    assert "it did not answer for 0 s" in note and seen[-1].notes == (note,)
    began_s = time.monotonic()
    assert trackers.close() == () and time.monotonic() - began_s < 2, "it is not waited for"


@pytest.mark.parametrize("recorded", [True, False])
def test_a_run_that_ends_by_an_error_has_failed(tool, tmp_path, recorded):
    trackers = make_trackers(["tensorboard"], {})
    with pytest.raises(RecipeError):
        try:
            shown(trackers, RunOpened(tmp_path), step_record(1), *([run_record()] if recorded else []))
            raise RecipeError(f"x must be y; password={SECRET}")
        finally:
            trackers.close()
    assert tool.calls[-1] == ("finish", ("failed: RecipeError: x must be y; password=***", 2, 1))


def test_an_error_that_was_handled_around_the_run_is_not_its_own(tool, tmp_path):
    try:
        raise ValueError
    except ValueError:
        trackers = make_trackers(["tensorboard"], {})
        shown(trackers, RunOpened(tmp_path), run_record())
        trackers.close()
    assert tool.calls[-1][1][:2] == ("finished", 0)


def test_a_resumed_run_goes_on_as_the_same_and_hands_no_step_over_twice(tool, tmp_path):
    identities = []
    for done, steps in ((0, range(1, 6)), (3, range(4, 8))):
        tool.calls.clear()
        trackers = make_trackers(["tensorboard"], {})
        shown(trackers, RunOpened(tmp_path, step=done), *(step_record(n, loss=float(n)) for n in steps))
        trackers.close()
        identities.append((tmp_path / "trackers" / "tensorboard.json").read_text().split('"')[3])
    assert identities[0] == identities[1]
    assert [row for call, rows in tool.calls if call == "log" for row in rows] == [(6, 6.0), (7, 7.0)]


def test_a_tracker_that_is_not_installed_is_refused_on_every_rank(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    make_trackers([], {})
    for is_main in (True, False):
        with pytest.raises(RecipeError, match="wandb is not. pip install") as caught:
            make_trackers(["wandb"], {}, is_main=is_main)
        assert caught.value.code == 2


def test_one_process_drives_the_tools(tool, tmp_path):
    trackers = make_trackers(["tensorboard"], {}, is_main=False)
    shown(trackers, RunOpened(tmp_path), step_record(1))
    assert trackers.close() == () and not tool.calls
