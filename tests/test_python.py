"""A run from Python: its events, its sinks, what stays in the process after it, and its answers."""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest

import launcher
from launcher import api
from launcher.errors import DataError, RecipeError, SinkError
from launcher.records.run import EvalRecord, RunOpened, RunRecord, StartRecord, StepRecord
from launcher.runtime.environment import QUIET_LOGGERS
from launcher.trained_run import TrainedRun
from tests.conftest import ROOT
from tests.support.arguments import replaced

pytestmark = pytest.mark.usefixtures("clean_dynamo")


class Kept:
    """A sink that keeps the events, and may fail at one of them."""

    def __init__(self, fails_at: type | str | None = None, *, fails_to_close: bool = False) -> None:
        self.events: list[Any] = []
        self.closed, self._fails_at, self._fails_to_close = 0, fails_at, fails_to_close

    def show(self, event: Any) -> None:
        self.events.append(event)
        if event == self._fails_at or (isinstance(self._fails_at, type) and isinstance(event, self._fails_at)):
            raise OSError(28, "no space left on device")  # of the sink's disk, not of the run's

    def close(self) -> None:
        self.closed += 1
        if self._fails_to_close:
            raise ValueError("cannot flush")


@pytest.fixture
def arguments(small_arguments: tuple[str, ...], tmp_path: Path) -> list[str]:
    """Of eight uncompiled steps in the folder `run`."""
    changed = ("train.steps=8", "compile.mode=off", "train.save_every=0", f"run.output_dir={tmp_path / 'run'}")
    return ["tiny", *replaced(small_arguments[1:], *changed[:2], changed[3])]


def status(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "run" / "status.json").read_text())
    return content


def models() -> list[Any]:
    gc.collect()
    names = ("PackedCausalLM", "Worker", "PeftModelForCausalLM")
    return [o for o in gc.get_objects() if type(o).__name__ in names]


@pytest.fixture(scope="module")
def of_others() -> list[Any]:
    """Models that other tests of this process hold."""
    return models()


def models_left(of_others: list[Any]) -> list[str]:
    known = {id(model) for model in of_others}
    return [type(model).__name__ for model in models() if id(model) not in known]


def until(events: Iterator[Any], kind: type | str, count: int = 1) -> Any:
    """The `count`th event of a kind, or the phase of this name."""
    found = (e for e in events if (isinstance(e, kind) if isinstance(kind, type) else getattr(e, "name", e) == kind))
    return [next(found) for _ in range(count)][-1]


def test_importing_the_package_takes_no_time_and_gives_run_and_events() -> None:
    code = (
        "import time; begun = time.process_time()\nimport launcher, sys\n"
        "assert time.process_time() - begun < 0.2 and not {'torch', 'pydantic', 'rich'} & sys.modules.keys()\n"
        "assert launcher.run is launcher.api.run and launcher.events is launcher.api.events\n"
        "assert 'torch' not in sys.modules\n"
        "try: launcher.nothing\nexcept AttributeError: print(launcher.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{launcher.__version__}\n", "")


def test_the_events_are_those_of_the_sinks_and_the_last_one_is_the_record(arguments: list[str], tmp_path: Path) -> None:
    sink, before = Kept(), (dict(os.environ), list(warnings.filters), signal.getsignal(signal.SIGTERM))
    levels = [logging.getLogger(name).level for name in QUIET_LOGGERS]
    events = []
    for event in launcher.events(*arguments, "train.deterministic=true", sinks=[sink]):
        events.append(event)
        assert signal.getsignal(signal.SIGTERM) == before[2], "between events the process is the caller's"
        assert not any(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in QUIET_LOGGERS)
    assert [logging.getLogger(name).level for name in QUIET_LOGGERS] == levels
    assert events == sink.events and sink.closed == 1
    assert [e.step for e in events if isinstance(e, StepRecord)] == list(range(1, 9))
    assert isinstance(events[-1], RunRecord) and status(tmp_path)["code"] == 0
    assert dict(os.environ) == before[0] and signal.getsignal(signal.SIGTERM) == before[2]
    assert ("ignore", None, FutureWarning, None, 0) not in [f for f in warnings.filters if f not in before[1]]


def test_who_leaves_while_steps_are_trained_has_them_saved_and_the_run_goes_on(
    arguments: list[str], tmp_path: Path, of_others: list[Any]
) -> None:
    for event in launcher.events(*arguments):
        if isinstance(event, StepRecord) and event.step == 3:
            break
    assert models_left(of_others) == []
    ended = status(tmp_path)
    assert (ended["code"], ended["resumable"], ended["step"]) == (130, True, 4) and "step 4 is saved" in ended["reason"]
    assert not (tmp_path / "run" / "run.lock").exists()
    assert [event.step for event in launcher.events(*arguments) if isinstance(event, StepRecord)] == [5, 6, 7, 8]


def test_an_error_of_the_loop_over_the_events_saves_them_too(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        for event in launcher.events(*arguments):
            assert not isinstance(event, StepRecord) or event.step / 0
    assert "step 2 is saved" in status(tmp_path)["reason"]


@pytest.mark.parametrize(("kind", "code"), [("loading model", 130), ("saving adapter", 130), (RunRecord, 0)])
def test_who_leaves_elsewhere_ends_the_run_at_once_and_after_its_record_it_is_whole(
    arguments: list[str], tmp_path: Path, kind: type | str, code: int, of_others: list[Any]
) -> None:
    events = launcher.events(*arguments)
    until(events, kind)
    with pytest.raises(RecipeError, match="one model at a time; the run of tiny goes on"):
        launcher.run("tiny", quiet=True)
    events.close()
    assert status(tmp_path)["code"] == code and models_left(of_others) == []
    assert not (tmp_path / "run" / "run.lock").exists()


def test_an_interrupt_is_raised_and_the_same_call_goes_on(arguments: list[str], tmp_path: Path) -> None:
    """As by a notebook's stop button of a notebook, while a step is trained."""

    class Pressed(Kept):
        def show(self, event: Any) -> None:
            super().show(event)
            if isinstance(event, StepRecord) and event.step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sink = Pressed()
    try:
        with pytest.raises(KeyboardInterrupt, match="step 3 is saved"):
            launcher.run(*arguments, sinks=[sink], quiet=True)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert sink.closed == 1 and status(tmp_path)["code"] == 130
    assert len(launcher.run(*arguments, quiet=True).steps) == 8


def test_a_sink_that_fails_ends_the_run_which_is_saved_and_names_it(arguments: list[str], tmp_path: Path) -> None:
    bad, good = Kept(StepRecord, fails_to_close=True), Kept()
    with pytest.raises(SinkError) as caught:
        launcher.run(*arguments, sinks=[bad, good], quiet=True)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "a sink must take every event; Kept.show raised OSError: [Errno 28] no space left on device, given StepRecord "
        "of step 1."
    )
    assert lines[2].startswith("step 2 is saved; with run.output_dir=")
    assert lines[3] == "Kept.close raised ValueError: cannot flush" and len(lines) == 4
    assert isinstance(caught.value.__cause__, OSError)
    assert (bad.closed, good.closed) == (1, 1) and len([e for e in good.events if isinstance(e, StepRecord)]) == 2
    assert status(tmp_path)["code"] == 1 and status(tmp_path)["resumable"]
    assert len(launcher.run(*arguments, quiet=True).steps) == 8


def test_a_sink_that_fails_before_the_steps_ends_the_run_at_once_and_after_them_once_it_is_whole(
    arguments: list[str], tmp_path: Path
) -> None:
    sinks = Kept(RunOpened), Kept("saving adapter"), Kept(fails_to_close=True)
    with pytest.raises(SinkError, match="given RunOpened of step 0"):
        launcher.run(*arguments, sinks=sinks[:1], quiet=True)
    assert len(sinks[0].events) == 3
    with pytest.raises(SinkError, match="given 'saving adapter'"):
        launcher.run(*arguments, sinks=sinks[1:2], quiet=True)
    assert (tmp_path / "run" / "report.json").exists() and (tmp_path / "run" / "adapter").is_dir()
    changed = replaced(arguments, f"run.output_dir={tmp_path / 'other'}")
    with pytest.raises(SinkError, match=r"Kept.close raised ValueError: cannot flush\.\nAll else is done"):
        launcher.run(*changed, sinks=sinks[2:], quiet=True)
    assert json.loads((tmp_path / "other" / "status.json").read_text())["code"] == 0
    assert [sink.closed for sink in sinks] == [1, 1, 1]


def test_sinks_are_closed_once_also_when_the_recipe_is_refused_or_the_events_are_left(arguments: list[str]) -> None:
    sink, failing = Kept(), Kept(fails_to_close=True)
    with pytest.raises(RecipeError):
        launcher.run(*arguments, "lora.r=-1", sinks=[sink], quiet=True)
    events = launcher.events(*arguments, sinks=[failing])
    next(event for event in events if isinstance(event, RunRecord))
    with pytest.raises(SinkError, match="cannot flush"):
        events.close()
    assert (sink.closed, failing.closed) == (1, 1)


def test_a_failed_run_that_the_notebook_remembers_holds_no_model(arguments: list[str], of_others: list[Any]) -> None:
    try:
        launcher.run(*arguments, sinks=[Kept(EvalRecord)], quiet=True)
    except SinkError as error:
        kept = error
    assert models_left(of_others) == []
    assert "test_python.py" in "".join(traceback.format_exception(kept)), "the caller's own line is still told"


@pytest.mark.slow
def test_each_run_of_a_process_counts_its_own_compilations(arguments: list[str], tmp_path: Path) -> None:
    """The third follows a failed one."""
    compiled = replaced(arguments, "compile.mode=strict", "train.steps=1")
    records = []
    for name in ("first", "second", "failed", "third"):
        folder = f"run.output_dir={tmp_path / name}"
        if name == "failed":
            with pytest.raises(SinkError):
                launcher.run(*replaced(compiled, folder), sinks=[Kept(StartRecord)], quiet=True)
        else:
            records.append(launcher.run(*replaced(compiled, folder), quiet=True).ranks[0].compile)
    assert len({record.planned_graphs for record in records}) == 1 and records[0].planned_graphs > 1
    assert {(r.expected_graphs, r.compilations, r.recompiles) for r in records} == {
        (records[0].planned_graphs, records[0].compilations, 0)
    }


def test_a_run_gives_metrics_for_a_table_and_answers_until_it_is_freed(
    arguments: list[str], tmp_path: Path, of_others: list[Any]
) -> None:
    run = launcher.run(*arguments, "train.eval_every=4", quiet=True)
    assert isinstance(run, TrainedRun) and run.adapter == str(tmp_path / "run" / "adapter")
    assert len(repr(run)) < 300 and "8 steps" in repr(run)
    table = pandas.DataFrame(run.metrics)
    assert list(table["step"]) == list(range(9))
    assert list(table["eval_loss"].dropna().index) == [0, 4, 8] and list(table["loss"].dropna().index) == [*range(1, 9)]
    chat = [{"role": "user", "content": "Define the noun heron."}]
    answer = run.generate(chat[0]["content"], max_tokens=3)
    assert isinstance(answer, str) and run.generate(chat, max_tokens=3) == answer
    assert run.generate(chat, max_tokens=3, base=True) != answer
    tools = [{"name": "look_up", "description": "Looks a word up.", "parameters": {}}]
    with pytest.raises(DataError, match='"tools" is a list'):
        run.generate(chat, tools=[{"parameters": {}}])
    with pytest.raises(RecipeError, match="must write the tools"):  # tiny's template knows none
        run.generate(chat, tools=tools)
    assert models_left(of_others).count("PeftModelForCausalLM") == 1
    run.free()
    run.free()
    assert models_left(of_others) == []
    with pytest.raises(RecipeError, match="no key top_q"):
        run.generate("x", top_q=1)
    with pytest.raises(RecipeError, match="its prompt and its run; got prompts too"):
        run.generate("x", prompts="y")


def test_a_run_on_random_weights_says_why_it_cannot_answer(arguments: list[str]) -> None:
    run = launcher.run(*arguments, "model.init=random", quiet=True)
    assert run.adapter is None
    with pytest.raises(RecipeError, match="had random weights"):
        run.generate("x")


def test_what_is_refused_before_the_run_leaves_the_process_as_it_was() -> None:
    before = dict(os.environ)
    with pytest.raises(RecipeError, match=r"run\(\) trains; got mode=preview"):
        next(api.events("tiny", "mode=preview"))
    with pytest.raises(RecipeError, match="model.name"):
        launcher.run("tiny", "model.name=./nowhere", quiet=True)
    assert dict(os.environ) == before and not api._running
