"""Why the compile contract broke, in plain words, with dynamo's own below."""

from collections.abc import Sequence

from launcher.records.explanation import Explanation
from launcher.report.pages.formatting import counted
from launcher.report.pages.page import Facts, Item, Section, Styled, Value

EXPLANATIONS_SHOWN = 4  # of different ones; report.json has all


def explanations(given: Sequence[tuple[int, Sequence[Explanation]]]) -> Section:
    """Of each rank what it gives. An explanation that several ranks give is shown once, with all of them."""
    ranks_of: dict[Explanation, dict[int, None]] = {}
    for rank, of_rank in given:
        for explanation in of_rank:
            ranks_of.setdefault(explanation, {})[rank] = None
    shown = list(ranks_of.items())[:EXPLANATIONS_SHOWN]
    items: list[Item] = [Facts(_rows(explanation, list(ranks))) for explanation, ranks in shown]
    if (left_out := len(ranks_of) - len(shown)) > 0:
        items.append(Styled(f"{counted(left_out, 'more explanation')} in report.json", "dim"))
    return Section("Why it broke", items)


def _rows(explanation: Explanation, ranks: Sequence[int]) -> list[tuple[Value, ...]]:
    rows: list[tuple[str, Value]] = [
        ("line", explanation.line),
        ("before", explanation.before),
        ("now", explanation.now),
        ("remedy", Styled(explanation.remedy, "strong")),
        ("dynamo", Styled(explanation.raw, "dim")),
    ]
    ranks_text = Styled(f"rank {', '.join(map(str, ranks))}", "bad")
    return [(ranks_text, explanation.what), *(row for row in rows if row[1])]
