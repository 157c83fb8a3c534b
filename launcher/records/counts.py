"""The counts of prepared data, in words. Stdlib only."""

from collections.abc import Mapping

WORDS = {"truncated": "rows truncated", "split": "rows split"}


def count_name(key: str) -> str:
    """ "rows_dropped_no_answer" as "rows dropped: no answer"."""
    prefix = "validation_" if key.startswith("validation_") else ""
    name = key.removeprefix(prefix)
    words = (prefix + WORDS.get(name, name)).replace("zero_supervised", "nothing to learn").replace("_", " ")
    return words.replace("dropped ", "dropped: ")


def counts_in_words(counts: Mapping[str, int]) -> str:
    """ "12 rows read; 1 row dropped: empty"."""
    names = {key: count_name(key).replace("rows", "row" if count == 1 else "rows") for key, count in counts.items()}
    return "; ".join(f"{count:,} {names[key]}" for key, count in counts.items())
