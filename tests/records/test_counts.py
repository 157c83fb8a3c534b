"""Counts in words: no name of the code reaches the user."""

import pytest

from launcher.records.counts import count_name, counts_in_words


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("rows_read", "rows read"),
        ("rows_dropped_zero_supervised", "rows dropped: nothing to learn"),
        ("validation_pieces_dropped_zero_supervised", "validation pieces dropped: nothing to learn"),
        ("truncated", "rows truncated"),
        ("validation_split", "validation rows split"),
        ("source_1_rows_of_an_epoch", "source 1 rows of an epoch"),
    ],
)
def test_a_count_reads_as_words(key, words):
    assert count_name(key) == words


def test_counts_stand_before_their_words():
    assert counts_in_words({"rows_read": 1_200, "rows_dropped_empty": 1}) == "1,200 rows read; 1 row dropped: empty"
