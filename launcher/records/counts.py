"""The counts of prepared data, in words. Stdlib only."""

from collections.abc import Mapping

WORDS = {"truncated": "rows truncated", "split": "rows split"}
UNCLOSED = "turns_without_end_token"
CUT_OFF = "turns_cut_before_end"  # by data.max_length
ENDING_RULES = {
    "template": "as the template writes it",
    "next_turn": "as the opening of what follows",
    "eos": "appended",
    "completion": "appended to a completion",
    "text": "as the completion has it",
}


def count_name(key: str) -> str:
    """ "rows_dropped_no_answer" as "rows dropped: no answer"."""
    prefix = "validation_" if key.startswith("validation_") else ""
    name = key.removeprefix(prefix)
    words = (prefix + WORDS.get(name, name)).replace("zero_supervised", "nothing to learn").replace("_", " ")
    return words.replace("dropped ", "dropped: ")


def counts_in_words(counts: Mapping[str, int]) -> str:
    """ "12 rows read; 1 row dropped: empty"; answers by what ends them stand last."""
    shown = {key: count for key, count in counts.items() if not is_of_ends(key)}
    names = {key: count_name(key).replace("rows", "row" if count == 1 else "rows") for key, count in shown.items()}
    return "; ".join([*(f"{count:,} {names[key]}" for key, count in shown.items()), *_ends(counts)])


def closed_key(rule: str, token: str) -> str:
    """The count of answers that end with this token by this one of ENDING_RULES."""
    return f"turns_closed_by_{rule}_{token}"


def closed_turns(counts: Mapping[str, int]) -> dict[tuple[str, str], int]:
    """Answers by the rule that ends them and the token."""
    return {
        (rule, key.removeprefix(closed_key(rule, ""))): count
        for rule in ENDING_RULES
        for key, count in counts.items()
        if key.startswith(closed_key(rule, ""))
    }


def is_of_ends(key: str) -> bool:
    """Whether ends_in_words has this count, of training or validation data."""
    name = key.removeprefix("validation_")
    return name in (UNCLOSED, CUT_OFF) or any(name.startswith(closed_key(rule, "")) for rule in ENDING_RULES)


def ends_in_words(counts: Mapping[str, int]) -> str:
    """ "<|user|> ends 2 answers, as the opening of what follows; no token ends 1"; "" without answers."""
    return "; ".join(_ends(counts))


def _ends(counts: Mapping[str, int]) -> list[str]:
    parts = [
        f"{token} ends {count:,} answer{'s' * (count != 1)}, {ENDING_RULES[rule]}"
        for (rule, token), count in closed_turns(counts).items()
    ]
    others = {UNCLOSED: "no token ends {:,}", CUT_OFF: "{:,} are cut off before their end"}
    return parts + [words.format(counts[key]) for key, words in others.items() if counts.get(key)]
