"""The page of an evaluation: figures side by side, answers cut to a table, and what was left out."""

import math
from dataclasses import replace

from launcher.records.answers import Answer, Answered
from launcher.records.evaluation import EvaluationRecord, ModelFigures
from launcher.records.run import Verdict
from tests.support.records import ESCAPED, HOSTILE, section, shown

RECORD = EvaluationRecord(
    run="runs/a/adapter", base="owner/base", device="CPU", dtype="float32", data="own.jsonl", rows=2, documents=3,
    tokens=1000, supervised_tokens=600, loss_on={"assistant": 2}, counts={}, trained=ModelFigures(2.0, 0.75),
    without_adapter=ModelFigures(4.0, 0.25), run_eval_loss=None,
    answers=(Answered("What is it?", Answer("a bird", 3, 1.0, True), Answer("word " * 99, 9, 1.0, False), "a heron"),),
    elapsed_s={"trained": 1.0}, verdicts=(), notes=("a note",),
)  # fmt: skip


def test_the_base_stands_beside_the_adapter_and_answers_beside_the_datas_own() -> None:
    text = shown(RECORD)
    table = section(text, "Figures")
    assert "loss 2.00000 4.00000" in table and "perplexity 7.389 54.598" in table
    assert "token accuracy 0.7500 0.2500" in table
    assert "2 rows, 3 documents, 600 supervised tokens of 1,000" in text and "assistant in 2 rows" in text
    answers = "\n".join(section(text, "Answers"))
    assert all(part in answers for part in ("What is it?", "a heron", "a bird", "word …")) and "a note" in text
    assert "Verdicts" not in text


def test_without_base_samples_and_rows_nothing_is_made_up() -> None:
    text = shown(replace(RECORD, without_adapter=None, answers=(), rows=None, loss_on={}, data=HOSTILE))
    assert "base alone" not in text and "Answers" not in text and "loss on" not in text
    assert "rows" not in text and "3 documents" in text and ESCAPED.split("\\x9b")[0] in text


def test_a_verdict_that_fails_is_in_page_message_and_report() -> None:
    broken = replace(RECORD, verdicts=(Verdict("the loss is what the run measured", False, "far"),))
    assert "FAIL" in str(section(shown(broken), "Verdicts")) and "far" in broken.failure
    report = replace(broken, trained=ModelFigures(math.inf, 0.0)).as_report()
    assert (report["mode"], report["holds"], report["trained"]["perplexity"]) == ("evaluate", False, None)
    assert report["without_adapter"]["perplexity"] == math.exp(4.0)
