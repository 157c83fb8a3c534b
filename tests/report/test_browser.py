"""The page of a run in a real browser, at the widths of a phone and of a desk, everything clicked."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.records.run import EvalRecord, Sample
from launcher.report.html_page import html_of
from tests.support.browser import CHROMIUM, DRIVER, Browser, browser
from tests.support.records import rank_record, run_record, step_record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
]
LONG = "a" * 300  # a word that fits nowhere
WIDER = "return document.documentElement.scrollWidth > document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as one:
        yield one


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = run_record(
        *(rank_record(n) for n in range(4)), recipe={"train": {"save_every": "10m"}, "model": {"name": LONG}},
        sample=Sample(LONG, "</script><img src=x onerror=alert(1)>", LONG), notes=(LONG,),
    )  # fmt: skip
    steps = tuple(step_record(n) for n in range(1, 2_001))
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(html_of(replace(run, steps=steps, evals=(EvalRecord(0, 3.0), EvalRecord(2_000, 1.0)))))
    return file


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window_asked_for_or_wrong_and_all_can_be_clicked(
    session: Browser, page: Path, width: int, dark: bool
) -> None:
    session.open(page, width=width, dark=dark)
    assert session.run("return innerWidth") == width and not session.run(WIDER)
    labels = session.find(".chart > label")
    assert len(labels) == 6
    for element in [*labels, *session.find("summary")]:
        session.click(element)
        assert not session.run(WIDER)
    assert session.run("return document.querySelectorAll(':checked').length") == 6
    assert session.run("return document.querySelector('details').open")
    assert session.logged("browser") == [] and session.requests() == [page.as_uri()]
    back = session.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(back) < 60) == dark


def test_the_switches_change_what_is_drawn(session: Browser, page: Path) -> None:
    shown = "return getComputedStyle(document.querySelector(`.chart ${arguments[0]}`)).display"
    session.open(page, width=1280, scripts=False)  # the style sheet alone does it
    before = [session.run(shown, selector) for selector in (".view.linear", ".view.log", ".smoothed")]
    for label in session.find(".chart > label")[:2]:
        session.click(label)
    after = [session.run(shown, selector) for selector in (".view.linear", ".view.log", ".smoothed")]
    assert [state == "none" for state in before] == [False, True, True]
    assert [state == "none" for state in after] == [True, False, False]


def test_the_figures_of_a_step_are_read_out_by_pointer_and_keys(session: Browser, page: Path) -> None:
    session.open(page, width=1280)
    read = "return document.querySelector('output').textContent"
    assert session.run(read).startswith("step 2,000 · train ")
    plot = session.find(".plot")[0]
    session.type(plot, "\ue011")  # Home
    assert re.fullmatch(r"step 0 · train [\d.]+ \([\d.]+ to 2.381\) at 1 · eval 3", session.run(read))
    session.type(plot, "\ue014")  # right arrow
    second = session.run(read)
    session.click(plot)
    middle = session.run(read)
    assert second != middle and 900 < int(middle.split()[1].replace(",", "")) < 1_100
    assert not session.run("return document.querySelector('.cursor').hidden")


def test_without_scripts_the_page_is_complete(session: Browser, page: Path) -> None:
    wide = "return [...document.querySelectorAll('.view.linear path')].map(e => e.getBoundingClientRect().width)"
    session.open(page, width=390)
    with_scripts = session.run(wide)
    session.open(page, width=390, scripts=False)
    assert session.run(wide) == with_scripts and max(with_scripts) > 250
    assert session.run("return document.querySelector('output').textContent") == ""
