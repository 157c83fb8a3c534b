"""The start panel, beside what tests/test_report.py says of it: widths, streams, what the loss sees."""

import io
from typing import Any

from rich.console import Console

from launcher.report import start_panel
from tests.report.test_run_summary import printed, start_record


def started(**changes: Any) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    start_panel(console, start_record(**changes))
    return printed(console)


def test_the_start_panel_tells_several_widths_from_one_and_a_stream_from_rows() -> None:
    assert "B × S = 2 × 2,048 ·" in started() and "packed: 251 blocks" in started()
    several = started(widths=(64, 512, 2048), batching="bucketed")
    assert "B × S = 2 × (64, 512, 2,048)" in several and "at most 32,768 tokens" in several
    assert "6.40 epochs" in several
    stream = started(streamed=True, train_rows=0, epochs=None)
    assert (
        "streamed, packed: 251 blocks, 97.3 % filled, in the first window" in stream
        and " 0 rows" not in stream
        and "epochs" not in stream
    )


def test_the_start_panel_says_what_the_loss_sees_and_whose_template_renders() -> None:
    text = started(loss_on={"assistant": 3000, "all": 412}, template="chatml")
    assert "assistant in 3,000 rows, all in 412 rows · template: chatml" in text


def test_the_start_panel_says_of_how_many_tokens_the_loss_is_computed_where_not_of_all() -> None:
    one = started(loss_tokens=(2425,))
    assert "assistant in 3,412 rows · computed for at most 2,425 of 4,096 tokens · template: the tokenizer's own" in one
    several = started(widths=(64, 512, 2048), loss_tokens=(128, 500, 2048))
    assert "· computed for at most 49 to 100 % of the tokens · template" in several
    assert "computed" not in started() + started(loss_tokens=(4096,))


def test_the_start_panel_says_whether_the_step_is_captured_and_why_not() -> None:
    reason = "off (capture failed: called a synchronizing CUDA operation)"
    assert "CUDA graphs on" in " ".join(started().split())
    assert reason in started(cuda_graphs=reason)
