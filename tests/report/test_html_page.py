"""The page of a run as HTML: everything that the console shows, escaped, masked, small, and asking for nothing."""

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from launcher.records.past import RunEnd, UnfinishedRun
from launcher.records.run import EvalRecord, Sample, Verdict
from launcher.report.html_page import document, html_of
from launcher.report.pages import page_of
from launcher.report.pages.page import Page, Section, Styled, Tokens
from tests.support.records import PLAIN_TEXT, rank_record, run_record, section, shown, start_record, step_record

ATTACK = "</script></style></title><img src=x onerror=alert(1)>\"'><script>alert(2)</script>&lt;"
TAGS = {  # all that a page is made of
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p", "main", "section", "div", "span",
    "small", "b", "i", "figure", "figcaption", "input", "label", "output", "svg", "path", "g", "script", "table",
    "thead", "tbody", "tfoot", "tr", "th", "td", "details", "summary", "footer",
}  # fmt: skip


class Reader(HTMLParser):
    """The elements and the texts of a page, as a browser finds them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = set[str](), set[str](), ""
        self.scripts, self._within = list[str](), ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self._within = tag

    def handle_data(self, data: str) -> None:
        if self._within == "script":
            self.scripts.append(data)
        elif self._within != "style":
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._within = ""


def hostile() -> Any:
    """A run each of whose texts attacks."""
    rank = rank_record(0, device=ATTACK, graph_breaks=1, graph_break_reasons=(ATTACK,), graphs_by_region={ATTACK: 1})
    start = start_record(recipe=ATTACK, model=ATTACK, run_dir=ATTACK, template=ATTACK, notes=(ATTACK,))
    return run_record(
        rank, recipe={"train": {"save_every": ATTACK}, ATTACK: {ATTACK: [ATTACK]}}, start=start, notes=(ATTACK,),
        elapsed_s={ATTACK: 1.0}, sample=Sample(ATTACK, ATTACK, ATTACK), verdicts=(Verdict(ATTACK, False, ATTACK),),
        stopped=ATTACK, adapter=ATTACK,
    )  # fmt: skip


def test_no_text_of_a_user_becomes_markup() -> None:
    read = Reader(html_of(hostile()))
    assert read.tags <= TAGS and not {name for name in read.attributes if name.startswith("on")}
    assert not {"src", "href", "action", "srcset"} & read.attributes
    assert read.text.count(ATTACK) > 20 and not any("alert" in script for script in read.scripts)
    assert "img" in Reader(f"<p>{ATTACK}</p>").tags  # else it would be no attack


def test_what_a_browser_would_obey_or_hide_is_shown_as_its_escape() -> None:
    html = html_of(run_record(sample=Sample("a\u202eb\x00c\ud800", "x", "y")))
    assert "a\\u202eb\\x00c\\ud800" in html and html.encode()


def test_credentials_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-very-own-value")
    token = "hf_" + "aB3" * 12
    html = html_of(replace(hostile(), notes=(f"with {token}",), recipe={"train": {"save_every": "a-very-own-value"}}))
    assert token not in html and "a-very-own-value" not in html and "with ***" in html


def test_the_page_asks_for_nothing_and_lets_only_its_own_script_run() -> None:
    html = html_of(run_record())
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy and policy[1].startswith("default-src 'none';") and "script-src 'sha256-" in policy[1]
    script = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)[0]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy[1]
    style = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)[0]
    assert "url(" not in style and "@import" not in style and "http" not in html.replace("http-equiv", "")


def test_every_section_of_the_console_and_every_key_of_the_recipe_is_on_the_page() -> None:
    run = run_record(
        rank_record(0), rank_record(1, recompiles=1, graph_hash="other"), notes=("a note",),
        recipe={"train": {"save_every": "10m", "lr": 2e-4}, "model": {"name": "m"}},
    )  # fmt: skip
    text = Reader(html_of(run)).text
    titles = [part.title for part in page_of(run).sections if part.items]
    assert {"Loss", "Ranks", "Verdicts", "Sample", "Next", "✗ RANKS DIFFER: graph hash"} <= set(titles)
    for title in [*titles, "Curves", "Set-up", "Peak memory by phase and rank", "train.lr", "model.name", "0.0002"]:
        assert title in text
    assert "own [bold]" in text and "a list of words" in text and "0 breaks on 1 rank" in text and "a note" in text


def test_the_page_says_where_each_value_of_the_recipe_is_from() -> None:
    recipe = {"train": {"save_every": "10m", "lr": 2e-4, "clip": 1.0}}
    run = run_record(recipe=recipe, recipe_origins={"train.lr": "command line", "train.save_every": "file"})
    text = Reader(html_of(run)).text
    assert "3 keys, 2 set" in text
    assert [text.index(word) < text.index("command line") for word in ("train.lr", "0.0002")] == [True, True]
    assert "default" in text[text.index("train.clip") :]
    assert "default" not in Reader(html_of(replace(run, recipe_origins={}))).text  # a report that does not tell


def test_the_curves_are_drawn_without_javascript() -> None:
    html = html_of(run_record(steps=30))
    for title in ("Loss", "Learning rate", "Gradient norm", "Step time", "VRAM, allocated"):
        assert f"<figcaption>{title}" in html
    assert html.count('class="view linear"') == 5 and html.count('class="view log"') == 3
    assert html.count('<g class="line0 smoothed">') == 6 and '<g class="line1">' in html


def test_a_run_of_100_000_steps_is_a_page_of_less_than_400_kB_with_its_spike() -> None:
    steps = [step_record(n, loss=2 + n % 7 / 10, step_s=0.4 + n % 3) for n in range(1, 100_001)]
    steps[71_233] = replace(steps[71_233], loss=9.5)
    evals = tuple(EvalRecord(n, 2.0) for n in range(0, 100_001, 10))
    html = html_of(replace(run_record(), steps=tuple(steps), evals=evals))
    assert len(html.encode()) < 400_000 and "9.5]" in html


def test_a_run_without_a_report_has_a_page_that_says_how_it_ended() -> None:
    ending = RunEnd(130, f"interrupted {ATTACK}", 0, 5, resumable=True)
    steps = tuple(step_record(n) for n in range(1, 6))
    read = Reader(html_of(UnfinishedRun("/runs/x", steps, (), (), ending, in_use=False, checkpoints=(4,))))
    assert "code 130" in read.text and "from step 4" in read.text and "Curves" in read.text and read.tags <= TAGS
    empty = Reader(html_of(UnfinishedRun("/runs/x", (), (), (), None, in_use=False, checkpoints=())))
    assert "killed" in empty.text and "Curves" not in empty.text


def test_a_page_of_any_items_is_drawn_and_the_console_shows_headline_figures() -> None:
    html = document(Page([Section("a", [Section("b", ["line", Styled("x", "bad"), Tokens(PLAIN_TEXT.parts)])])], "t"))
    assert "<h3" in html and '<span class="bad">x</span>' in html and "river" in html
    with pytest.raises(TypeError, match="no int"):
        document(Page([Section("a", [3])]))  # type: ignore[list-item]
    from launcher.report.pages.web import web_page

    text = shown(web_page(run_record(recipe={"train": {"save_every": 0}, "model": {}})))
    assert "peak memory" in text and section(text, "Set-up") and "of the adapter" not in text
    best = shown(web_page(run_record(recipe={"train": {"save_every": 0}, "model": {}}, eval_adapter=1.25)))
    assert "eval loss of the adapter" in best and "1.2500" in best and "1.4711" in best
