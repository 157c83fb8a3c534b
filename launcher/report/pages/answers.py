"""An answered prompt as a page: the answer, beside it the base's and the data's own where there are such."""

from launcher.records.answers import Answer, Answered
from launcher.report.pages.formatting import counted, rate
from launcher.report.pages.page import Facts, Page, Section, Styled, Value


def answers_page(record: Answered) -> Page:
    """One section; texts whole."""
    rows: list[tuple[Value, Value]] = []
    if record.expected is not None:
        rows.append(("expected", record.expected))
    sides = {"trained" if record.base else "answer": record.trained} | ({"base": record.base} if record.base else {})
    for name, answer in sides.items():
        rows += [(name, answer.text), ("", Styled(speed(answer), "dim"))]
    return Page([Section(" ".join(record.prompt.split())[:100], [Facts(rows)])])


def speed(answer: Answer) -> str:
    """ "12 tokens, 30 tokens/s"; that max_tokens ended it, where it did."""
    cut = "" if answer.ended else "; cut by max_tokens"
    return f"{counted(answer.tokens, 'token')}, {rate(answer.tokens, answer.elapsed_s)} tokens/s{cut}"
