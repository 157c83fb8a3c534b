"""What .csv files, .parquet files and datasets of the hub have in common."""

from launcher.credentials import shortened
from launcher.data.read.rows import shown_value
from launcher.errors import DataError

BATCH_ROWS = 1000  # rows of a table in memory at a time


def distinct(columns: list[str], name: str) -> list[str]:
    """The columns of a table. Raises DataError if two have the same name."""
    if len(set(columns)) < len(columns):
        repeated = next(column for column in columns if columns.count(column) > 1)
        raise DataError(
            f"{name}: columns have different names.\nFound: {shown_value(repeated)} twice.\nRename one of them."
        )
    return columns


def unreadable(name: str, error: BaseException, *, after: int, remedy: str) -> DataError:
    """The error for a table that could not be read beyond row `after`, with the first cause in its own words."""
    while error.__cause__ is not None:
        error = error.__cause__
    place = f" after row {after}" if after else ""
    return DataError(
        f"{name}: a source must be readable as a table.\n"
        f"Found{place}: {one_line(error) or type(error).__name__}\n{remedy}, or write its rows into a .jsonl file."
    )


def one_line(text: object) -> str:
    return shortened(" ".join(str(text).split()), 300)
