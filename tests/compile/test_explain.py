"""Dynamo's words are explained by text alone: those of other versions, of a past report, and any other text."""

import re
import time

import pytest

from launcher.compile.causes import BACKENDS, BREAKS, GUARDS, UNKNOWN
from launcher.compile.explain import explain, message, names
from tests.conftest import ROOT

ROW = re.compile(r"^\| (`.+?`) \| (.+?) \| (.+?) \|$", re.MULTILINE)
SECTION = (ROOT / "docs" / "compile.md").read_text(encoding="utf-8").partition("## When it breaks")[2]
ROWS = ROW.findall(SECTION.partition("\n## ")[0])


def kind_of(said: str) -> str:
    return "backend" if "Inductor" in said else "break" if any(re.search(c.says, said) for c in BREAKS) else "recompile"


@pytest.mark.parametrize(("said", "means", "remedy"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_of_the_page_is_what_a_run_says(said, means, remedy):
    said = said[3:-3] if said.startswith("`` ") else said.strip("`")
    explanation = explain(kind_of(said), said)
    parts = [part for part in re.split(r"`.*?`|…", means) if part]
    assert all(part in explanation.what for part in parts) and explanation.remedy == remedy.replace("`", "")


def test_the_page_has_every_remedy():
    remedies = {cause.remedy for cause in (*GUARDS, *BREAKS, *BACKENDS)}
    assert remedies == {row[2].replace("`", "") for row in ROWS}


ODD = [
    "",
    " ",
    "\n",
    "0/0: ",
    "0/0:\n- 0/1: ",
    "x" * 50_000,
    " a" * 20_000,
    "0/0: tensor '" * 2_000,
    "{name} {",
    "\x00\ud800",
]
ODD += [
    "Recompiling function f in nowhere.py:99",
    "0/0: new_guard(L['x'])  # y  # no/file.py:3 in f",
    "tensor '' size mismatch",
]


@pytest.mark.parametrize("kind", ["recompile", "limit", "break", "backend", "silent"])
@pytest.mark.parametrize("raw", ODD, ids=range(len(ODD)))
def test_any_text_gets_an_explanation_at_once(kind, raw):
    began = time.perf_counter()
    explanation = explain(kind, raw)
    assert explanation.raw == raw.strip() and explanation.what and explanation.remedy
    assert len(message(explanation).splitlines()) <= 7 and names(raw) is not None
    assert time.perf_counter() - began < 2


def test_an_unknown_reason_says_so_and_points_to_the_page():
    explanation = explain("recompile", "Recompiling function f in model.py:7\n  - 0/0: ___new_guard(L['x'])")
    assert explanation.what == UNKNOWN == "no explanation known; dynamo's own words:"
    assert "docs/compile.md" in explanation.remedy and explanation.line == "model.py:7"
    assert "dynamo: 0/0: ___new_guard(L['x'])" in message(explanation)


def test_the_reasons_of_a_past_report_are_explained_though_their_lines_are_joined():
    raw = (
        "Recompiling function forward in model.py:12 triggered by the following guard failure(s): "
        "- 0/1: tensor 'x' size mismatch at index 1. expected 1024, actual 1023 "
        "- 0/0: GLOBAL_STATE changed: grad_mode"
    )
    explanation = explain("recompile", raw)
    assert explanation.what == "a length of 1,023 is not one of the planned 1,024 (dimension 1 of x)"
    assert (explanation.before, explanation.now, explanation.line) == ("1,024", "1,023", "model.py:12")
    joined = "- 0/0: mask is None  # if mask  # why/m.py:3 in f"
    joined += ' - User stack trace: -   File "/m.py", line 3, in f -     if mask'
    assert explain("recompile", joined).line == "/m.py:3: if mask"


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        ("0/0: L['self'].training == True", "train() and eval()"),
        ("0/0: tensor 'L['x']' size mismatch at index 1. expected 64, actual 65", "a length of 65 is not"),
        ("0/0: len(L['xs']) == 3", "number of items (len(xs))"),
        ("0/0: ___check_obj_id(L['self'].act, 9412)", "self.act is another object"),
        ("0/0: expected type of 'L['mask']' to be a tensor type, ' but found <class 'NoneType'>", "mask was a plain"),
        ("0/0: Tensor device index mismatch. Expected device index to be 0, got 1", "on another device"),
        ("Unsupported: call_function UserDefinedObjectVariable(x) Tensor.item", "values on the host (item)"),
    ],
)  # fmt: skip
def test_other_wordings_are_read_too(raw, what):
    assert what in explain("break" if raw.startswith("Unsupported") else "recompile", raw).what
